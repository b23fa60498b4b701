-- The cache's calls, each in one round trip.
--
-- KEYS  1 values (hash: member -> value; the field "" holds the sum of all sizes)
--       2 used (sorted set: member -> when, in ms)   3 expire (sorted set: member -> when, in ms)
--       4 names (sorted set, all of score 0: for all members of one owner)
--       A member is OWNER, a zero byte, KEY.
-- ARGV  1 get | put | forget | drop   2 now in Unix ms, or "" for this server's clock
--       3 ttl in ms   4 bytes that all entries may have   5 bytes counted for an entry itself
--       6 … get, forget: members; put: member, value, …; drop: the owner
-- Answers  get: a value or nil for each member; drop: how many there were; else: 0
--
-- Redis evicts keys under its own maxmemory, but only whole ones, and a policy that may do so
-- would take the quotas next door as well; hence the accounting here. Should a key be lost all
-- the same, the cache begins anew.

local VALUES, USED, EXPIRE, NAMES = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local SUM = ''
local PURGE = 1000   -- at most so many expired entries leave in one call

local now_ms = tonumber(ARGV[2])
if not now_ms then
  local time = redis.call('TIME')
  now_ms = tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
end
local ttl_ms, max_bytes, entry_bytes = tonumber(ARGV[3]), tonumber(ARGV[4]), tonumber(ARGV[5])

-- No two entries have the same: the sorted set would order them by name.
local function used_now()
  local last = redis.call('ZREVRANGE', USED, 0, 0, 'WITHSCORES')
  return math.max(now_ms, (tonumber(last[2]) or 0) + 1)
end

local function remove(member)
  local length = redis.call('HSTRLEN', VALUES, member)
  if redis.call('HDEL', VALUES, member) == 1 then
    redis.call('HINCRBY', VALUES, SUM, -(length + entry_bytes))
  end
  redis.call('ZREM', USED, member)
  redis.call('ZREM', EXPIRE, member)
  redis.call('ZREM', NAMES, member)
end

local function make_room()
  while (tonumber(redis.call('HGET', VALUES, SUM)) or 0) > max_bytes do
    local victim = redis.call('ZRANGE', USED, 0, 0)[1]
    if not victim then
      return
    end
    remove(victim)
  end
end

local function is_whole()
  local entries = math.max(0, redis.call('HLEN', VALUES) - 1)
  for _, key in ipairs({USED, EXPIRE, NAMES}) do
    if redis.call('ZCARD', key) ~= entries then
      return false
    end
  end
  return true
end

if ARGV[1] == 'get' then
  local found = {}
  for at = 6, #ARGV do
    local member = ARGV[at]
    local expires_ms = tonumber(redis.call('ZSCORE', EXPIRE, member) or 0)
    local value = expires_ms > now_ms and redis.call('HGET', VALUES, member)
    if value then
      redis.call('ZADD', USED, used_now(), member)
    end
    found[#found + 1] = value or false
  end
  return found
end

if ARGV[1] == 'put' then
  if not is_whole() then
    redis.call('UNLINK', VALUES, USED, EXPIRE, NAMES)
  end
  for _, member in ipairs(redis.call('ZRANGEBYSCORE', EXPIRE, '-inf', now_ms, 'LIMIT', 0, PURGE)) do
    remove(member)
  end
  for at = 6, #ARGV, 2 do
    local member, value = ARGV[at], ARGV[at + 1]
    remove(member)
    redis.call('HSET', VALUES, member, value)
    redis.call('HINCRBY', VALUES, SUM, #value + entry_bytes)
    redis.call('ZADD', USED, used_now(), member)
    redis.call('ZADD', EXPIRE, now_ms + ttl_ms, member)
    redis.call('ZADD', NAMES, 0, member)
    make_room()
  end
  for _, key in ipairs(KEYS) do   -- a cache that nobody writes to any more goes as a whole
    if redis.call('PTTL', key) < ttl_ms then
      redis.call('PEXPIRE', key, ttl_ms)
    end
  end
  return 0
end

if ARGV[1] == 'forget' then
  for at = 6, #ARGV do
    remove(ARGV[at])
  end
  return 0
end

local members = redis.call('ZRANGEBYLEX', NAMES, '[' .. ARGV[6] .. '\0', '(' .. ARGV[6] .. '\1')
for _, member in ipairs(members) do
  remove(member)
end
return #members
