"""Each kind by examples, all of them on made text, and none of them slow."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from faker import Faker

from deployments.guardrails.kinds import Action, PiiKind
from deployments.guardrails.pii import RULES
from deployments.guardrails.pii.card import luhn
from deployments.guardrails.pii.national_id import steuer_id
from deployments.guardrails.screen import Masker, Screen

ALL = Screen([(rule, Action.MASK) for rules in RULES.values() for rule in rules])
ONLY = {kind: Screen([(rule, Action.MASK) for rule in rules]) for kind, rules in RULES.items()}


def masked(text: str, screen: Screen = ALL) -> str:
    return Masker(screen).push(text, last=True)


FOUND = {
    PiiKind.EMAIL: [
        "jane.doe@example.org",
        "j+spam@mail.example.co.uk",
        "JÖRG_99@büro-müller.de",
        "o'brien@x.io",
    ],
    PiiKind.CARD: [
        "4111111111111111",
        "4111 1111 1111 1111",
        "4111-1111-1111-1111",
        "4000000000006",
        "378282246310005",
        "3782 822463 10005",
        "5555555555554444",
        "2223003122003222",
        "6011111111111117",
        "30569309025904",
        "3530111333300000",
    ],
    PiiKind.IBAN: [
        "DE89370400440532013000",
        "DE89 3704 0044 0532 0130 00",
        "GB82 WEST 1234 5698 7654 32",
        "gb82west12345698765432",
        "FR14 2004 1010 0505 0001 3M02 606",
        "NO93 8601 1117 947",
    ],
    PiiKind.NATIONAL_ID: [
        "123-45-6789",
        "123 45 6789",
        "AB123456C",
        "AB 12 34 56 C",
        "86095742719",
        "86 095 742 719",
        "255081416802538",
        "2 55 08 14 168 025 38",
        "12345678Z",
        "X1234567L",
        "X-1234567-L",
    ],
    PiiKind.IP: [
        "192.168.0.1",
        "8.8.8.8",
        "2001:db8::1",
        "fe80::1ff:fe23:4567:890a",
        "2001:0db8:85a3:0000:0000:8a2e:0370:7334",
        "::ffff:192.0.2.128",
    ],
    PiiKind.PHONE: [
        "+493012345678",
        "+49 (0)30 1234-5678",
        "+44 20 7946 0958",
        "0044 20 7946 0958",
        "020 7946 0958",
        "(01632) 960 123",
        "030/1234567",
        "01 23 45 67 89",
        "01.23.45.67.89",
        "(555) 234-5678",
        "555-234-5678 ext. 12",
        "1-555-234-5678",
        "5552345678",
    ],
}
LEFT_ALONE = {
    PiiKind.EMAIL: ["jane at example.org", "a@b", "@example.org", "1@2.3", "git@", "a@.com"],
    PiiKind.CARD: [
        "4111111111111112",
        "41111111111111111111",
        "9111111111111110",
        "1700000000000",
        "0.4111111111111111",
        "A4111111111111111",
    ],
    PiiKind.IBAN: [
        "DE88370400440532013000",
        "DE8937040044053201300",
        "DE893704004405320130001",
        "XX89370400440532013000",
        "DE89",
    ],
    PiiKind.NATIONAL_ID: [
        "000-45-6789",
        "666-45-6789",
        "900-45-6789",
        "123-00-6789",
        "123-45-0000",
        "123456789",
        "GB123456C",
        "AB123456E",
        "86095742718",
        "12345678901",
        "255081416802539",
        "12345678A",
        "X1234567M",
    ],
    PiiKind.IP: [
        "1.2.3",
        "256.1.1.1",
        "1.2.3.4.5",
        "01.02.03.04",
        "12:34:56",
        "std::vector",
        "a[::2]",
        "a[1::2]",
        "aa:bb:cc:dd:ee:ff",
        "::",
        "12::34::56",
    ],
    PiiKind.PHONE: [
        "01.02.2024",
        "01/02/2024",
        "01-02-2024 10",
        "2024-01-02",
        "1700000000",
        "123456789",
        "12 345 678 901",
        "0.0123456789",
        "$2345678901",
        "#0123456789",
        "5551234",
        "10:15 - 11:45",
    ],
}


@pytest.mark.parametrize("around", ["{}", "It is {}.", "({})", "no:{}, b", "»{}«", "x\n{}\nx"])
@pytest.mark.parametrize(("kind", "text"), [(k, text) for k in FOUND for text in FOUND[k]])
def test_what_is_found(kind: PiiKind, text: str, around: str) -> None:
    mask = f"[{kind.upper()}]"
    assert masked(around.format(text), ONLY[kind]) == around.format(mask)
    if not (kind is PiiKind.NATIONAL_ID and text.isdigit()):  # may be a number of another kind too
        assert masked(around.format(text)) == around.format(mask)


@pytest.mark.parametrize("around", ["{}", "It is {}.", "x\n{}\nx"])
@pytest.mark.parametrize(
    ("kind", "text"), [(k, text) for k in LEFT_ALONE for text in LEFT_ALONE[k]]
)
def test_what_is_left_alone(kind: PiiKind, text: str, around: str) -> None:
    assert masked(around.format(text), ONLY[kind]) == around.format(text)


def test_words_behind_an_iban_are_none_of_it() -> None:
    text = "IBAN DE89 3704 0044 0532 0130 00 BIC COBA DEFF at noon"
    assert masked(text) == "IBAN [IBAN] BIC COBA DEFF at noon"


def test_a_number_behind_a_phone_number_is_none_of_it() -> None:
    assert masked("Ring 0113 496 0123 2024 times") == "Ring [PHONE] 2024 times"


def test_several_in_a_row() -> None:
    text = "a@b.co,c@d.co 8.8.8.8;9.9.9.9 4111111111111111/4111111111111111"
    assert masked(text) == "[EMAIL],[EMAIL] [IP];[IP] [CARD]/[CARD]"


LOCALES = ("en_US", "en_GB", "de_DE", "fr_FR", "es_ES")
FRAMES = {
    "en": ("Please contact {}, thanks.", "My details: {}", "We noted {} yesterday.", "{} is mine!"),
    "de": ("Bitte notieren: {}.", "Meine Angaben sind {}, danke.", "{} ist richtig."),
    "fr": ("Voici : {}.", "Mes données sont {}, merci.", "« {} » est à moi."),
    "es": ("Aquí está: {}.", "Mis datos son {}, gracias.", "¿Es {} correcto?"),
}


def national_id(fake: Faker, locale: str) -> str:
    match locale:
        case "en_US" | "fr_FR":
            return str(fake.ssn())
        case "en_GB":  # Faker's own are of a prefix that is never given out
            form = fake.random_element(("?? ## ## ## %", "??######%"))
            text = fake.lexify(fake.numerify(form.replace("%", "A")), letters="ABCEHJLMPRSWXY")
            return str(text)
        case "es_ES":
            return str(fake.random_element((fake.nif(), fake.nie())))
    while True:  # Faker has none of Germany's
        number = fake.numerify("%##########")
        if steuer_id(number):
            return str(number)


def grouped(text: str) -> str:
    return " ".join([text[at : at + 4] for at in range(0, len(text), 4)])


def personal(fake: Faker, locale: str, kind: PiiKind) -> str:
    makers: dict[PiiKind, Callable[[], str]] = {
        PiiKind.EMAIL: lambda: fake.random_element((fake.email(), fake.company_email())),
        PiiKind.PHONE: fake.phone_number,
        PiiKind.IBAN: lambda: fake.random_element((fake.iban(), grouped(fake.iban()))),
        PiiKind.CARD: fake.credit_card_number,
        PiiKind.NATIONAL_ID: lambda: national_id(fake, locale),
        PiiKind.IP: lambda: fake.random_element((fake.ipv4(), fake.ipv6())),
    }
    return makers[kind]()


def with_personal_data() -> Iterator[tuple[PiiKind, str, str]]:
    """Kind, sentence, the sentence as it should read: 80 of each locale."""
    for number, locale in enumerate(LOCALES):
        fake = Faker(locale)
        fake.seed_instance(20_261_125 + number)
        for count in range(80):
            kind = list(PiiKind)[count % len(PiiKind)]
            frame = f"{fake.sentence()} {fake.random_element(FRAMES[locale[:2]])}"
            yield (
                kind,
                frame.format(personal(fake, locale, kind)),
                frame.format(f"[{kind.upper()}]"),
            )


def without() -> Iterator[str]:
    """80 of each locale, most of them with numbers of some other kind."""
    for number, locale in enumerate(LOCALES):
        fake = Faker(locale)
        fake.seed_instance(7_000 + number)
        others: list[Callable[[], str]] = [
            fake.date,
            fake.time,
            lambda fake=fake: fake.date(pattern="%d.%m.%Y"),  # type: ignore[misc]
            lambda fake=fake: fake.date(pattern="%d/%m/%Y %H:%M"),  # type: ignore[misc]
            lambda fake=fake: fake.iso8601(),  # type: ignore[misc]
            lambda fake=fake: fake.numerify("v#.##.#"),  # type: ignore[misc]
            lambda fake=fake: fake.numerify("%#,###.## EUR"),  # type: ignore[misc]
            lambda fake=fake: fake.numerify("ORD-%#######"),  # type: ignore[misc]
            lambda fake=fake: fake.numerify("%## ###"),  # type: ignore[misc]
            lambda fake=fake: str(fake.pyfloat(right_digits=6)),  # type: ignore[misc]
            fake.isbn13,
            fake.ean13,
            fake.uuid4,
            fake.sha1,
            fake.mac_address,
            fake.postcode,
            fake.street_address,
            fake.name,
            fake.url,
            fake.hex_color,
        ]
        for count in range(80):
            frame = fake.random_element(FRAMES[locale[:2]])
            yield f"{fake.sentence()} {frame.format(others[count % len(others)]())}"


def test_nearly_all_of_it_is_found_and_exactly() -> None:
    made = list(with_personal_data())
    missed = [(kind, text, masked(text)) for kind, text, right in made if masked(text) != right]
    assert len(made) == 400
    assert 1 - len(missed) / len(made) >= 0.95, missed
    for kind in PiiKind:
        of_kind = [text for what, text, _ in made if what is kind]
        share = 1 - len([1 for what, _, _ in missed if what is kind]) / len(of_kind)
        assert share >= 0.9, (kind, missed)


def test_hardly_anything_else_is() -> None:
    made = list(without())
    wrong = [(text, masked(text)) for text in made if masked(text) != text]
    assert len(made) == 400
    assert len(wrong) / len(made) <= 0.02, wrong


@pytest.mark.parametrize(
    "piece",
    [
        "1", "1-", "1 ", "1111 ", "1.", "1:", ":", "::", "a", "a.", "a@", "a@a.", "@", "0", "0 ",
        "0123 ", "(0", "(0123) ", "+1", "+1 ", "00", "DE89 ", "DE893704004405320130", "4111 1111 ",
        "4111111111111111 ", "411111111111111", "AB12", "é", "\n", "123-45-", "1.1.1.", "a@b.co ",
    ],
)  # fmt: skip
@pytest.mark.parametrize("tail", ["", "@example.org", "4111111111111111"])
def test_a_hundred_kilobytes_of_malice(piece: str, tail: str) -> None:
    """No pattern of ours takes more than a time that is linear; see also the test's time limit."""
    text = (piece * (100_000 // len(piece)))[:100_000] + tail
    streamed = Masker(ALL)
    pieces = [text[at : at + 512] for at in range(0, len(text), 512)]
    shown = "".join([streamed.push(one) for one in pieces]) + streamed.push("", last=True)
    assert shown == masked(text)


def test_luhn() -> None:
    assert luhn("79927398713")
    assert not any(luhn(f"7992739871{digit}") for digit in "012456789")
