-- The decisions of limits.py, in one round trip. What Python names there has the same name here.
--
-- KEYS  1 cells (hash: limit's key -> cell)   2 leases (sorted set: lease -> expiry)
--       3 holds (hash: lease -> what it holds)
-- ARGV  1 reserve | settle | renew | levels | spent | drop   2 now in Unix ms, or "" for this server's clock
--       3 lease   4 ttl in ms   5 … for reserve, levels and spent, five a demand: name, strategy, amount,
--       window in ms, asked; for settle, two a limit: name, used
-- Answers  reserve, levels, spent: {allowed, remaining, reset_ms, retry_ms, …}, three a demand; -1: never
--          settle, renew: 1, or 0 if there is no such lease; drop: how many of the keys there were
--
-- Whole numbers stay below 2^53. cmsgpack keeps them; cjson would round them to 14 digits.

local SLICES, TICKS, DAY_MS = 10, 60000, 86400000
local CELLS, LEASES, HOLDS = KEYS[1], KEYS[2], KEYS[3]
local floor, max, min = math.floor, math.max, math.min

local now_ms = tonumber(ARGV[2])
if not now_ms then
  local time = redis.call('TIME')
  now_ms = tonumber(time[1]) * 1000 + floor(tonumber(time[2]) / 1000)
end

local function ceil(numerator, denominator)
  return -floor(-numerator / denominator)
end

-- Days since 1970 <-> civil months: Howard Hinnant, chrono-compatible low-level date algorithms.
local function month_of(days)
  local z = days + 719468
  local era = floor(z / 146097)
  local doe = z - era * 146097
  local yoe = floor((doe - floor(doe / 1460) + floor(doe / 36524) - floor(doe / 146096)) / 365)
  local doy = doe - (365 * yoe + floor(yoe / 4) - floor(yoe / 100))
  local mp = floor((5 * doy + 2) / 153)
  local month = mp < 10 and mp + 2 or mp - 10
  local year = yoe + era * 400 + (month <= 1 and 1 or 0)
  return year * 12 + month
end

local function first_day_of(month)
  local year, m = floor(month / 12), month % 12
  if m <= 1 then year = year - 1 end
  local era = floor(year / 400)
  local yoe = year - era * 400
  local doy = floor((153 * (m <= 1 and m + 10 or m - 2) + 2) / 5)
  local doe = yoe * 365 + floor(yoe / 4) - floor(yoe / 100) + doy
  return era * 146097 + doe - 719468
end

local function window(limit)
  if limit.window_ms > 0 then
    local number = floor(now_ms / limit.window_ms)
    return number, (number + 1) * limit.window_ms
  end
  local month = month_of(floor(now_ms / DAY_MS))
  return month, first_day_of(month + 1) * DAY_MS
end

local function kept(cell, slice)
  local result = {}
  for at = 1, #cell, 2 do
    if cell[at] >= slice - SLICES then
      result[#result + 1] = cell[at]
      result[#result + 1] = cell[at + 1]
    end
  end
  return result
end

local function ticks_of(limit)
  local tick_ms = max(1, floor(limit.window_ms / TICKS))
  return tick_ms, floor(limit.window_ms / tick_ms)
end

local function refilled(limit, cell)
  local tick_ms, ticks = ticks_of(limit)
  local full = limit.amount * ticks
  if #cell == 0 then return full end
  return min(full, cell[2] + max(0, floor(now_ms / tick_ms) - cell[1]) * limit.amount)
end

-- remaining, reset_ms, retry_ms
local function level(limit, asked, cell, running)
  local used, reset_ms, retry_ms = 0, 0, 0
  if limit.strategy == 'concurrent' then
    used, retry_ms = running, 1000
  elseif limit.strategy == 'fixed_window' then
    local number, end_ms = window(limit)
    if #cell > 0 and cell[1] >= number then used = cell[2] end
    reset_ms = end_ms - now_ms
    retry_ms = reset_ms
  elseif limit.strategy == 'sliding_window' then
    local width = floor(limit.window_ms / SLICES)
    local slices = kept(cell, floor(now_ms / width))
    for at = 2, #slices, 2 do used = used + slices[at] end
    local left = used
    for at = 1, #slices, 2 do
      reset_ms = (slices[at] + SLICES + 1) * width - now_ms
      if asked > limit.amount - left then
        left = left - slices[at + 1]
        retry_ms = reset_ms
      end
    end
  else
    local tick_ms, ticks = ticks_of(limit)
    local filled = refilled(limit, cell)
    local free = floor(filled / ticks)
    if limit.amount > 0 then
      reset_ms = ceil(limit.amount * ticks - filled, limit.amount) * tick_ms
      retry_ms = ceil(asked * ticks - filled, limit.amount) * tick_ms
    end
    if asked > limit.amount then retry_ms = -1 end
    if asked <= free then retry_ms = 0 end
    return free, reset_ms, retry_ms
  end
  local remaining = max(0, limit.amount - used)
  if asked > limit.amount then retry_ms = -1 end
  if asked <= remaining then retry_ms = 0 end
  return remaining, reset_ms, retry_ms
end

-- place, cell
local function charged(limit, cell, amount)
  if limit.strategy == 'concurrent' then return 0, nil end
  if limit.strategy == 'fixed_window' then
    local number = window(limit)
    if #cell > 0 and cell[1] >= number then return cell[1], { cell[1], cell[2] + amount } end
    return number, { number, amount }
  end
  if limit.strategy == 'sliding_window' then
    local slice = floor(now_ms / floor(limit.window_ms / SLICES))
    local slices = kept(cell, slice)
    if #slices > 0 and slices[#slices - 1] >= slice then
      slices[#slices] = slices[#slices] + amount
    else
      slices[#slices + 1] = slice
      slices[#slices + 1] = amount
    end
    return slices[#slices - 1], slices
  end
  local tick_ms, ticks = ticks_of(limit)
  local tick = max(floor(now_ms / tick_ms), cell[1] or 0)
  return 0, { tick, refilled(limit, cell) - amount * ticks }
end

local function given_back(hold, cell, back)
  if hold.strategy == 'fixed_window' then
    if cell[1] == hold.place then cell[2] = cell[2] - back end
  elseif hold.strategy == 'sliding_window' then
    for at = 1, #cell, 2 do
      if cell[at] == hold.place then cell[at + 1] = cell[at + 1] - back end
    end
  elseif hold.strategy == 'token_bucket' then
    local tick_ms, ticks = ticks_of(hold)
    local filled = min(hold.amount * ticks, refilled(hold, cell) + back * ticks)
    cell = { max(floor(now_ms / tick_ms), cell[1]), filled }
  end
  return cell
end

local function cell_of(limit)
  local packed = redis.call('HGET', CELLS, limit.key)
  return packed and cmsgpack.unpack(packed) or {}
end

local function keep(limit, cell)
  redis.call('HSET', CELLS, limit.key, cmsgpack.pack(cell))
end

local function demands()
  local found = {}
  for at = 5, #ARGV, 5 do
    found[#found + 1] = {
      name = ARGV[at],
      strategy = ARGV[at + 1],
      amount = tonumber(ARGV[at + 2]),
      window_ms = tonumber(ARGV[at + 3]),
      asked = tonumber(ARGV[at + 4]),
      key = ARGV[at] .. ':' .. ARGV[at + 1] .. ':' .. ARGV[at + 3],
    }
  end
  return found
end

local function told(allowed, wanted, cells, running, asks)
  local answer = { allowed }
  for number, limit in ipairs(wanted) do
    local remaining, reset_ms, retry_ms = level(limit, asks and limit.asked or 0, cells[number], running)
    answer[#answer + 1] = remaining
    answer[#answer + 1] = reset_ms
    answer[#answer + 1] = retry_ms
  end
  return answer
end

local function forget(lease)
  redis.call('ZREM', LEASES, lease)
  redis.call('HDEL', HOLDS, lease)
end

local operation, lease, ttl_ms = ARGV[1], ARGV[3], tonumber(ARGV[4])
for _, over in ipairs(redis.call('ZRANGEBYSCORE', LEASES, '-inf', now_ms)) do forget(over) end

if operation == 'drop' then
  return redis.call('UNLINK', CELLS, LEASES, HOLDS)
end

if operation == 'renew' then
  if not redis.call('ZSCORE', LEASES, lease) then return 0 end
  redis.call('ZADD', LEASES, now_ms + ttl_ms, lease)
  return 1
end

if operation == 'settle' then
  local packed = redis.call('HGET', HOLDS, lease)
  if not packed then return 0 end
  local used = {}
  for at = 5, #ARGV, 2 do used[ARGV[at]] = tonumber(ARGV[at + 1]) end
  for _, hold in ipairs(cmsgpack.unpack(packed)) do
    local back = hold.held - (used[hold.name] or hold.held)
    local cell = cell_of(hold)
    if back ~= 0 and #cell > 0 then keep(hold, given_back(hold, cell, back)) end
  end
  forget(lease)
  return 1
end

local wanted, cells = demands(), {}
for number, limit in ipairs(wanted) do cells[number] = cell_of(limit) end

if operation == 'spent' then
  local limit, cell = wanted[1], cells[1]
  for _, packed in ipairs(redis.call('HVALS', HOLDS)) do
    for _, hold in ipairs(cmsgpack.unpack(packed)) do
      if hold.key == limit.key and #cell > 0 then cell = given_back(hold, cell, hold.held) end
    end
  end
  return told(1, wanted, { cell }, 0, false)
end

local running = redis.call('ZCARD', LEASES)
if operation == 'reserve' and redis.call('ZSCORE', LEASES, lease) then
  return told(1, wanted, cells, running, false)
end
local before = told(1, wanted, cells, running, true)
for at = 4, #before, 3 do
  if before[at] ~= 0 then before[1] = 0 end
end
if operation == 'levels' or before[1] == 0 then return before end

local holds = {}
for number, limit in ipairs(wanted) do
  if limit.asked > 0 then
    local place, cell = charged(limit, cells[number], limit.asked)
    if cell then
      cells[number] = cell
      keep(limit, cell)
    end
    limit.place, limit.held, limit.asked = place, limit.asked, nil
    holds[#holds + 1] = limit
  end
end
if #holds > 0 then
  redis.call('ZADD', LEASES, now_ms + ttl_ms, lease)
  redis.call('HSET', HOLDS, lease, cmsgpack.pack(holds))
  running = running + 1
end
return told(1, wanted, cells, running, false)
