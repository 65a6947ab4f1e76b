"""Answers that are one number, with or without a unit."""

from __future__ import annotations

import re
from typing import NamedTuple

Unit = tuple[tuple[str, int], ...]
"""Names with their powers, sorted: m/s² is (("m", 1), ("s", -2))."""


class Quantity(NamedTuple):
    """A number as algebra reads it, and its unit."""

    number: str
    unit: Unit


_PLAIN = (
    r"[1-9]\d{0,2}(?:,\d{3})+(?:\.\d+)?|[1-9]\d{0,2}(?:[ ]\d{3})+(?:\.\d+)?|\d+(?:\.\d*)?|\.\d+"
)
_QUANTITY = re.compile(
    rf"""
    (?P<money>\\?[$€£¥₹]\s*)?
    (?P<sign>[+-]\s*)?
    (?P<money2>\\?[$€£¥₹]\s*)?
    (?:
        (?P<whole>\d+)[ ]*\\frac\s*(?:\{{\s*(?P<over>\d+)\s*\}}|(?P<over1>\d))
            \s*(?:\{{\s*(?P<under>\d+)\s*\}}|(?P<under1>\d))
      | (?P<whole2>\d+)(?:[ ]+|-|\s+and\s+)(?P<over2>\d{{1,3}})[ ]?/[ ]?(?P<under2>\d{{1,3}})
      | (?P<frac>\\frac\s*(?:\{{\s*-?\d+(?:\.\d+)?\s*\}}|\d)\s*(?:\{{\s*\d+(?:\.\d+)?\s*\}}|\d))
      | (?P<ratio>\d+(?:\.\d+)?\s*/\s*\d+(?:\.\d+)?)
      | (?P<plain>{_PLAIN})
            (?P<scale>\s*(?:\\times|\\cdot|\*|x)\s*10\s*\^\s*(?:\{{\s*[+-]?\d+\s*\}}|[+-]?\d+)
                     |[eE][+-]?\d+(?![A-Za-z\d]))?
    )
    (?P<rest>(?![\d.,!_]|\^(?!\{{\\circ\}})|/\s*[^A-Za-z\s]).*)
    """,
    re.X | re.S,
)
_UNITS = {
    "percent": r"\% % percent pct percentage",
    "degree": "degree degrees deg",
    "°C": "celsius °c",
    "°F": "fahrenheit °f",
    "cent": "cent cents ¢",
    "dollar": "$ dollar dollars usd",
    "euro": "€ euro euros eur",
    "pound": "£ gbp",
    "yen": "¥ yen yuan rmb cny jpy 元",
    "rupee": "₹ rupee rupees rs",
    "mm": "mm millimeter millimeters millimetre millimetres 毫米",
    "cm": "cm cms centimeter centimeters centimetre centimetres 厘米",
    "dm": "dm decimeter decimeters 分米",
    "m": "m meter meters metre metres 米",
    "km": "km kms kilometer kilometers kilometre kilometres 千米 公里",
    "in": "in inch inches",
    "ft": "ft foot feet",
    "yd": "yd yard yards",
    "mi": "mi mile miles",
    "ms": "ms millisecond milliseconds",
    "s": "s sec secs second seconds 秒",
    "min": "min mins minute minutes 分钟",
    "h": "h hr hrs hour hours 小时",
    "day": "day days 天",
    "week": "week weeks wk wks",
    "month": "month months",
    "year": "year years yr yrs",
    "mg": "mg milligram milligrams",
    "g": "g gram grams gm 克",
    "kg": "kg kgs kilogram kilograms 千克 公斤",
    "t": "ton tons tonne tonnes 吨",
    "lb": "lb lbs",
    "oz": "oz ounce ounces",
    "mL": "ml milliliter milliliters millilitre millilitres 毫升",
    "L": "l liter liters litre litres 升",
    "gal": "gal gallon gallons",
    "acre": "acre acres",
    "N": "newton newtons 牛",
    "J": "joule joules",
    "W": "watt watts",
    "kW": "kilowatt kilowatts",
    "V": "volt volts",
    "A": "amp amps ampere amperes",
    "Hz": "hz hertz",
    "Pa": "pascal pascals",
    "K": "kelvin kelvins",
    "C": "coulomb coulombs",
    "Ω": r"ohm ohms \omega",
    "rad": "rad rads radian radians",
    "mol": "mol mole moles",
    "mph": "mph",
    "kmh": "kmh kph kmph",
    "people": "person people persons 人",
    "": "unit units 个",
}
_NAMES = {name: unit for unit, names in _UNITS.items() for name in names.split()}
_CASED = set("N J W V A K C kN kJ kW kV kPa MPa mA mV MW GW Pa Hz kHz MHz GHz eV keV MeV".split())
_EXPANDED: dict[str, Unit] = {"mph": (("h", -1), ("mi", 1)), "kmh": (("h", -1), ("km", 1))}
_POWERS = {"sq": 2, "square": 2, "cubic": 3, "cu": 3}
_POWERS_AFTER = {"squared": 2, "cubed": 3}
_MULTIPLES = {"thousand": 3, "million": 6, "billion": 9, "trillion": 12}
_NOT_UNITS = set(
    "and or not but to nor plus minus times over than less more wrong right false true is are "
    "per hundred dozen half pairs pair sin cos tan cot sec csc log ln exp sqrt lim max min mod gcd "
    "lcm alpha beta gamma delta theta lambda sigma omega phi psi infinity pi frac cdot circ thirds "
    "fourths halves quarter quarters percent".split()
)
_TOKEN = re.compile(
    r"""(?P<name>\^\{\\circ\}\s*[CF]?(?![A-Za-z])|\\?%|[$€£¥₹¢]|\\Omega(?![A-Za-z])
              |[A-Za-zμΩÅ]+\.?|[\u4e00-\u9fff]+)
        (?:\s*\^\s*(?:\{\s*(?P<power>[+-]?\d)\s*\}|(?P<power1>[+-]?\d))|(?P<power2>[23])(?!\d))?
      | (?P<over>/|per\b)
      | (?P<dot>\\cdot(?![A-Za-z])|\*|-)
      | (?P<space>\s+)
    """,
    re.X,
)
_FRACTION_OF_UNITS = re.compile(r"\\frac\{\s*([^{}]*)\s*\}\{([^{}]*(?:\{[^{}]*\}[^{}]*)?)\}")
_WITH_UNIT = re.compile(
    r"(.*(?:[\d})\]]|\\pi))"
    r"(\^\{\\circ\}|\s+(?:(?:sq|square|cubic|cu)\.?\s+)?[A-Za-z]{2,}\.?(?:\s*\^\s*(?:\{\d\}|\d))?"
    r"(?:\s*/\s*[A-Za-z]+(?:\s*\^\s*(?:\{\d\}|\d))?)?)",
    re.S,
)
_NAMED = re.compile(
    r"(?:m\s*)?(?:\\angle\s*)?(?:[A-Za-z]{1,3}|\d)(?:_\{?\w+\}?)?(?:'*)\s*=\s*(?=[^=])|"
    r"(?:m\s*)?\\angle\s*[A-Za-z0-9]{1,3}\s*=\s*"
)
_NUMBER_WORDS = {
    word: i
    for i, word in enumerate(
        "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
        "fifteen sixteen seventeen eighteen nineteen".split()
    )
} | {
    word: 20 + 10 * i
    for i, word in enumerate("twenty thirty forty fifty sixty seventy eighty ninety".split())
}
_PARTS = {
    "half": 2,
    "halves": 2,
    "third": 3,
    "thirds": 3,
    "fourth": 4,
    "fourths": 4,
    "quarter": 4,
    "quarters": 4,
    "fifth": 5,
    "fifths": 5,
}


def quantity(text: str) -> Quantity | None:
    """The number and unit of a flat answer, or None if it is anything else."""
    if len(text) > 120:
        return None
    match = _QUANTITY.fullmatch(text)
    if match is None:
        return _spelt(text)
    g = match.groupdict()
    rest, power = g["rest"].strip(), 0
    first = re.match(r"([a-z]+)\b\s*", rest, re.I)
    if first and first[1].lower() in _MULTIPLES:
        rest, power = rest[first.end() :], _MULTIPLES[first[1].lower()]
    attached = re.match(r"[A-Za-z]+", g["rest"])
    if attached and not power and _known(attached[0]) is None:
        return None  # 12cm, but not 1lar: an unknown word needs its space
    money = (g["money"] or g["money2"] or "").strip("\\ ")
    unit = _unit(f"{money} {rest}" if money else rest)
    if unit is None:
        return None
    sign = "-" if (g["sign"] or "").startswith("-") else ""
    whole = g["whole"] or g["whole2"]
    if whole:
        over = int(g["over"] or g["over1"] or g["over2"])
        under = int(g["under"] or g["under1"] or g["under2"])
        number = f"\\frac{{{int(whole) * under + over}}}{{{under}}}"
    elif g["plain"]:
        number = re.sub("[, ]", "", g["plain"])
        scale = re.search(r"[+-]?\d+(?=\D*$)", g["scale"]) if g["scale"] else None
        power += int(scale[0]) if scale else 0
    else:
        number = g["frac"] or g["ratio"]
    if abs(power) > 400:
        return None
    if power:
        number = f"{number}\\times10^{{{power}}}"
    return Quantity(sign + number, unit)


def without_name(text: str) -> tuple[str, str]:
    """What stands before the first equals sign, if that is a name, and what stands after it."""
    match = _NAMED.match(text)
    if match is None or "=" in text[match.end() :]:
        return "", text
    return re.sub(r"[\s={}]|\\angle|^m(?=\s|\\)", "", match[0]), text[match.end() :].strip()


def same_unit(reference: Unit, candidate: Unit) -> bool:
    """Whether a unit is right; one left out on either side is."""
    return not reference or not candidate or reference == candidate


def without_unit(text: str) -> tuple[str, Unit]:
    """An expression and the unit behind it: words of a unit only, since `2 x` is a product."""
    match = _WITH_UNIT.fullmatch(text)
    if match is None:
        return text, ()
    names = re.findall(r"[A-Za-z]+", re.sub(r"\\circ", "", match[2]))
    if not all(_known(n) is not None or n in _POWERS or n in _POWERS_AFTER for n in names):
        return text, ()
    unit = _unit(match[2])
    return (text, ()) if unit is None else (match[1].strip(), unit)


def is_percent(unit: Unit) -> bool:
    return unit == (("percent", 1),)


def _unit(text: str) -> Unit | None:
    """The unit that is all of the text, () for none, None if it is anything else."""
    text = _FRACTION_OF_UNITS.sub(r"\1/(\2)", text)
    text = re.sub(r"/\s*\(([^()]*)\)", lambda m: "/" + re.sub(r"[\s*]|\\cdot", "/", m[1]), text)
    powers: dict[str, int] = {}
    unknown: list[str] = []
    at, sign, pending = 0, 1, 1
    text = text.strip()
    while at < len(text):
        token = _TOKEN.match(text, at)
        if token is None or token.end() == at:
            return None
        at = token.end()
        if token["over"]:
            sign = -1
        if token["name"] is None:
            continue
        name = token["name"].rstrip(".")
        power = int(token["power"] or token["power1"] or token["power2"] or 1)
        if name.lower() == "per":
            sign = -1
            continue
        if name.lower() in _POWERS and not (name.lower() == "square" and at == len(text)):
            pending = _POWERS[name.lower()]
            continue
        if name.lower() in _POWERS_AFTER and powers:
            powers[next(reversed(powers))] *= _POWERS_AFTER[name.lower()]
            continue
        known = _known(name)
        if known is None:
            if not _may_be_a_unit(name):
                return None
            unknown.append(name.lower())
            known = _singular(name.lower())
        if known in _EXPANDED:
            for part, exponent in _EXPANDED[known]:
                powers[part] = powers.get(part, 0) + sign * exponent
        elif known:
            powers[known] = powers.get(known, 0) + sign * power * pending
        sign, pending = 1, 1
    if len(unknown) > 3:
        return None
    return tuple(sorted(powers.items()))


def _known(name: str) -> str | None:
    if name.startswith("^"):
        return {"C": "°C", "F": "°F"}.get(name[-1], "degree")
    if name in _CASED:
        return name
    if len(name) == 1 and name.isascii() and name.isupper() and name != "L":
        return None  # M is no metre
    return _NAMES.get(name) if name in _NAMES else _NAMES.get(name.lower())


def _may_be_a_unit(name: str) -> bool:
    """A word of which there can be several: apples. A letter or two are a variable of algebra."""
    if not name.isascii():
        return len(name) <= 4 and not set(name) & set("或和与百千万亿分倍")
    return len(name) >= 3 and name.lower() not in _NOT_UNITS and not name.isupper()


def _singular(word: str) -> str:
    return word[:-1] if len(word) > 3 and word.endswith("s") and not word.endswith("ss") else word


def _spelt(text: str) -> Quantity | None:
    """`twelve`, `twenty-one`, `two hundred and five`, `three quarters`, `half`, with a unit."""
    words = text.lower().replace("-", " ").split()
    if not words or not all(word.isalpha() for word in words):
        return None
    total = group = 0
    n, sign = 0, ""
    if words[0] in ("minus", "negative"):
        sign, words = "-", words[1:]
    last = 10**9
    for word in words:
        if word in _NUMBER_WORDS:
            value = _NUMBER_WORDS[word]
            if value >= last:
                return None  # `one two` is no number
            group, last = group + value, 10 if value >= 20 else 0
        elif word == "hundred" and 0 < group < 10:
            group, last = group * 100, 100
        elif word in ("thousand", "million") and group:
            total, group, last = total + group * 10 ** _MULTIPLES[word], 0, 10**9
        elif word == "and" and n and last == 100:
            pass
        else:
            break
        n += 1
    rest = words[n:]
    if n == 1 and rest and rest[0] in _PARTS:
        unit = _unit(" ".join(rest[1:]))
        number = f"{sign}\\frac{{{group}}}{{{_PARTS[rest[0]]}}}"
        return None if unit is None else Quantity(number, unit)
    if words in (["half"], ["a", "half"]):
        return Quantity(f"{sign}\\frac{{1}}{{2}}", ())
    if n == 0 or (n == 1 and words[0] == "one" and rest):
        return None
    unit = _unit(" ".join(rest))
    return None if unit is None else Quantity(f"{sign}{total + group}", unit)
