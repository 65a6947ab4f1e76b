"""Two answers side by side, by the kind of the reference: choice, number with unit, words, algebra.

What can be decided by reading is; the rest is written as algebra for math-verify.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from papo_fast.rewards.choices import choice, choices, chosen
from papo_fast.rewards.notation import flat, normal, without_spaces
from papo_fast.rewards.quantities import (
    Quantity,
    is_percent,
    quantity,
    same_unit,
    without_name,
    without_unit,
)


class Algebra(NamedTuple):
    """Two answers that only algebra can compare, as math-verify should read them."""

    reference: str
    candidate: str


LONGEST = 4000
"""Characters beyond which an answer is compared letter by letter only."""

_INTEGER = re.compile(r"([+-]?)0*([0-9]+)")
_PROSE = re.compile(r"[A-Za-z][A-Za-z'\".,!?;\s-]*")
_TEXT = re.compile(r"[A-Za-z0-9'\".,!?;:&\s-]*")
_WORD = re.compile(r"[A-Za-z]{3,}")
_SHORT_WORDS = set(
    "ad ah am an as at be by do eh go ha he hi ho id if in is it lo ma me mr ms my no of oh ok on "
    "or ox pa so tv uk up us we".split()
)
_FUNCTIONS = set(
    "sin cos tan cot sec csc log exp sqrt lim max min mod gcd lcm arcsin arccos arctan sinh cosh "
    "tanh and inf infinity percent pct percentage degrees degree alpha beta gamma delta "
    "theta lambda sigma omega phi psi".split()
)
_ELEMENTS = set(
    "H He Li Be B C N O F Ne Na Mg Al Si P S Cl Ar K Ca Sc Ti V Cr Mn Fe Co Ni Cu Zn Ga Ge As Se "
    "Br Kr Rb Sr Y Zr Nb Mo Tc Ru Rh Pd Ag Cd In Sn Sb Te I Xe Cs Ba La Ce Pr Nd Sm Eu Gd Tb Dy Ho "
    "Er Yb Lu Hf Ta W Re Os Ir Pt Au Hg Tl Pb Bi Po At Rn Fr Ra Ac Th Pa U Np Pu Am".split()
)
_FORMULA = re.compile(r"(?:\(?[A-Z][a-z]?\d*\)?\d*)+(?:\^?\d*[+-])?")
_CLOCK = re.compile(r"(\d{1,2}):(\d{2})\s*([ap])\.?\s?m\.?", re.I)
_TIME = re.compile(r"0?(\d{1,2}):(\d{2})")
_MIXED = re.compile(r"(?<![\d.,/])(\d+) (\d+)/(\d+)(?![\d.])")
_THOUSANDS = re.compile(r"(?<![\d,.])[1-9]\d{0,2}(?:,\d{3})+(?![\d,])")
_DIVIDED = re.compile(r"\s*(?:,|;|\bor\b|\band\b)\s*")
_UNFINISHED = re.compile(r"[-+*/^_=(<>×÷·]\s*")
_GIVEN_REASON = re.compile(r"\s*[,;]\s*(?:because|since|as)\s.*", re.S | re.I)


def judge(reference: str, candidate: str) -> bool | Algebra:
    """Whether two answers are equal where reading decides it, and what to ask algebra elsewhere."""
    if reference == candidate:
        return True
    if integers := _as_integers(reference.strip(), candidate.strip()):
        return integers == "equal"
    if max(len(reference), len(candidate)) > LONGEST:
        return Algebra(reference, candidate)  # too long for that too
    if _ends_unfinished(candidate) and not _ends_unfinished(reference):
        return False  # `8-` is no 8, though algebra would read it as one
    written, other = normal(reference), normal(candidate)
    if integers := _as_integers(written, other):
        return integers == "equal"
    if without_spaces(written) == without_spaces(other):
        return True
    plain, other_plain = flat(written), flat(other)
    if without_spaces(plain) == without_spaces(other_plain):
        return True
    chosen_right = _choice(plain, other_plain)
    if chosen_right is not None:
        return chosen_right
    by_number = _quantities(plain, other_plain)
    if by_number is not None:
        return by_number
    by_words = _texts(plain, other_plain)
    if by_words is not None:
        return by_words
    if lists := _lists(plain, other_plain):
        return lists
    (value, unit), (other_value, other_unit) = without_unit(plain), without_unit(other_plain)
    if not same_unit(unit, other_unit):
        return False
    return Algebra(
        _numbers(value if unit else written), _numbers(other_value if other_unit else other)
    )


def _ends_unfinished(answer: str) -> bool:
    return bool(answer) and _UNFINISHED.fullmatch(answer.rstrip()[-1:]) is not None


def _as_integers(reference: str, candidate: str) -> str:
    integer, other_integer = _INTEGER.fullmatch(reference), _INTEGER.fullmatch(candidate)
    if not integer or not other_integer:
        return ""
    (sign, digits), (other_sign, other_digits) = integer.groups(), other_integer.groups()
    same_sign = (sign == "-") == (other_sign == "-") or digits == "0"
    return "equal" if digits == other_digits and same_sign else "different"


def _choice(reference: str, candidate: str) -> bool | None:
    if one := choice(reference):
        letter, text = one
        letters = chosen(candidate)
        if letters or not text:
            return letters == {letter}
        verdict = judge(text, candidate)  # the text of the right option without its letter
        return verdict if isinstance(verdict, bool) else None
    if several := choices(reference):
        other = choices(candidate) or chosen(candidate)
        if reference.isalpha() and candidate.isalpha() and other == several:
            return None  # ABC and BCA, points of a figure
        return other == several and not re.search(r"\bor\b", candidate)
    return None


def _quantities(reference: str, candidate: str) -> bool | Algebra | None:
    name, value = without_name(reference)
    other_name, other_value = without_name(candidate)
    if name and other_name and name != other_name:
        return None
    right, given = quantity(value), quantity(other_value)
    if right is None or given is None:
        return None
    if not same_unit(right.unit, given.unit):
        return False
    return Algebra(_share(right, given), _share(given, right))


def _share(quantity: Quantity, other: Quantity) -> str:
    """A percent sign stays where the other has none, for math-verify: 10 % is 10, and 0.1."""
    return quantity.number + "\\%" * (is_percent(quantity.unit) and not is_percent(other.unit))


def _texts(reference: str, candidate: str) -> bool | None:
    clock, other_clock = _CLOCK.fullmatch(reference), _CLOCK.fullmatch(candidate)
    if clock or other_clock:
        parts, others = (
            (m.groups() if m else (*t.groups(), "") if (t := _TIME.fullmatch(x)) else None)
            for m, x in ((clock, reference), (other_clock, candidate))
        )
        if parts is None or others is None:
            return False
        same = (int(parts[0]), parts[1]) == (int(others[0]), others[1])
        return same and (not parts[2] or not others[2] or parts[2].lower() == others[2].lower())
    formula, other_formula = _formula(reference), _formula(candidate)
    if formula and (any(c.isdigit() for c in formula) or other_formula):
        return formula == other_formula
    if _is_words(reference):
        words = _words(reference)
        return words in (_words(candidate), _words(_GIVEN_REASON.sub("", candidate)))
    if _is_short_word(candidate) and reference.isalpha():
        return _words(reference) == _words(candidate)
    return None


def _formula(text: str) -> str | None:
    """A chemical formula without what only lowers its numbers."""
    text = re.sub(r"[\s_{}]", "", text)
    if not _FORMULA.fullmatch(text) or (text.isupper() and text.isalpha()):
        return None
    if not all(symbol in _ELEMENTS for symbol in re.findall(r"[A-Z][a-z]?", text)):
        return None
    return text


def _is_words(text: str) -> bool:
    if _is_short_word(text):
        return True
    words = [w for w in _WORD.findall(text) if w.lower() not in _FUNCTIONS]
    if _PROSE.fullmatch(text):
        # Two capitals or more are a word, but several choices, or points of a figure, in order.
        letters = re.sub(r"[\s.,]", "", text)
        if letters.isupper() and len(letters) > 1:
            return choices(letters) is None and "," not in text
        return any(not w.isupper() for w in words or _WORD.findall(text)[: text.isalpha()])
    # Words with numbers: Room 12.
    return bool(_TEXT.fullmatch(text)) and any(not w.isupper() for w in words) and len(words) > 0


def _is_short_word(text: str) -> bool:
    """A word of two letters: one of the language, or a capital and a small letter."""
    return (
        len(text) == 2
        and text.isalpha()
        and text.isascii()
        and (text.lower() in _SHORT_WORDS or (text[0].isupper() and text[1].islower()))
    )


def _words(text: str) -> str:
    text = re.sub(r"(?<=\b[A-Za-z])\.(?=[A-Za-z]\b|\s|$)", "", text)
    text = re.sub(r"\s*[.,!?;:\"]+(?=\s|$)|\"", "", text.casefold())
    return re.sub(r"^(?:the|an|a)\s+(?=\S)", "", " ".join(text.split()))


def _lists(reference: str, candidate: str) -> Algebra | None:
    """Lists of numbers with units, as lists of numbers."""
    if quantity(reference) or quantity(candidate):
        return None  # 1,000 is one number
    parts, others = _parts(reference), _parts(candidate)
    if parts is None or others is None or len(parts) != len(others):
        return None
    if not all(same_unit(a.unit, b.unit) for a in parts for b in others):
        return None
    return Algebra(*(", ".join(q.number for q in qs) for qs in (parts, others)))


def _parts(text: str) -> list[Quantity] | None:
    texts = _DIVIDED.split(text)
    found = [quantity(without_name(part)[1]) for part in texts]
    if len(texts) < 2 or any(q is None for q in found):
        return None
    return [q for q in found if q is not None]


def _numbers(text: str) -> str:
    """Mixed numbers and thousands as one number each; the comma of a point or a list stays."""
    text = _MIXED.sub(r"\1\\frac{\2}{\3}", text)
    if re.search(r"[(\[]|\\\{|,\s", text):
        return text
    return _THOUSANDS.sub(lambda m: m[0].replace(",", ""), text)
