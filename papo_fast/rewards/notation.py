"""One way of writing for each answer: Unicode to LaTeX, and off with what only sets type.

Nothing here decides whether two answers are equal. `papo_fast.rewards.answers` reads what this
module writes, and so does math-verify.
"""

from __future__ import annotations

import re
import unicodedata

_COMMANDS = {
    "√": r"\sqrt ",
    "∛": r"\sqrt[3] ",
    "∜": r"\sqrt[4] ",
    "∞": r"\infty ",
    "≥": r"\ge ",
    "⩾": r"\ge ",
    "≧": r"\ge ",
    "≤": r"\le ",
    "⩽": r"\le ",
    "≦": r"\le ",
    "≠": r"\ne ",
    "≈": r"\approx ",
    "±": r"\pm ",
    "∓": r"\mp ",
    "×": r"\times ",
    "÷": r"\div ",
    "·": r"\cdot ",
    "⋅": r"\cdot ",
    "∙": r"\cdot ",
    "∪": r"\cup ",
    "∩": r"\cap ",
    "∅": r"\emptyset ",
    "∈": r"\in ",
    "ℝ": r"\mathbb{R} ",
    "ℤ": r"\mathbb{Z} ",
    "ℕ": r"\mathbb{N} ",
    "ℚ": r"\mathbb{Q} ",
    "ℂ": r"\mathbb{C} ",
    "°": r"^{\circ}",
    "º": r"^{\circ}",
    "˚": r"^{\circ}",
    "℃": r"^{\circ}C",
    "℉": r"^{\circ}F",
    "∠": r"\angle ",
    "△": r"\triangle ",
    "∥": r"\parallel ",
    "⊥": r"\perp ",
    "→": r"\to ",
    "%": r"\%",
}
_SIGNS = {
    **dict.fromkeys("−–—‐‑‒―﹣", "-"),
    **dict.fromkeys("“”„«»", '"'),
    **dict.fromkeys("‘’ʼ", "'"),
    **dict.fromkeys("\u200b\u200c\u200d\u2060\ufeff\u00ad", ""),
    **dict.fromkeys("\u00a0\u2000\u2001\u2002\u2003\u2004\u2005\u2006", " "),
    **dict.fromkeys("\u2007\u2008\u2009\u200a\u202f\u205f\u3000", " "),
    **dict(zip("。、【】〔〕∶", ".,[][]:", strict=True)),
    "∗": "*",
    "⁄": "/",
    "∕": "/",
    "µ": "μ",
}
_GREEK = (
    "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi omicron pi rho "
    "final sigma tau upsilon phi chi psi omega"
).split()
_RAISED = dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁼⁽⁾ⁿⁱ", "0123456789+-=()ni", strict=True))
_LOWERED = dict(zip("₀₁₂₃₄₅₆₇₈₉₊₋₌₍₎", "0123456789+-=()", strict=True))


def _table() -> dict[int, str]:
    table = {ord(sign): text for sign, text in (_SIGNS | _COMMANDS).items() if sign != "%"}
    for i, name in enumerate(_GREEK):
        if name not in ("omicron", "final"):
            table[0x3B1 + i] = f"\\{name} "
    capitals = "Gamma Delta Theta Lambda Xi Pi Sigma Phi Psi Omega".split()
    table |= {ord(sign): f"\\{name} " for sign, name in zip("ΓΔΘΛΞΠΣΦΨΩ", capitals, strict=True)}
    for code in range(0xFF01, 0xFF5F):  # full width
        table[code] = chr(code - 0xFEE0)
    return table


_TABLE = _table()
del _TABLE[ord("μ")]  # a prefix of units; algebra reads it too

_RAISED_RUN = re.compile(f"[{''.join(_RAISED)}]+")
_LOWERED_RUN = re.compile(f"[{''.join(_LOWERED)}]+")
_FRACTION = re.compile("[¼-¾⅐-⅞]")
_ROOT_OF = re.compile(r"(\\sqrt(?:\[[34]\])?) \s*(?:\(([^()]*)\)|([0-9]+(?:\.[0-9]+)?|[A-Za-z]))")
_SYNONYMS = [
    (re.compile(pattern), by)
    for pattern, by in (
        (r"\\[dtc]frac(?![A-Za-z])", r"\\frac"),
        (r"\\varnothing(?![A-Za-z])", r"\\emptyset"),
        (r"\\geq(?:slant)?(?![A-Za-z])|\\geqslant(?![A-Za-z])", r"\\ge"),
        (r"\\leq(?:slant)?(?![A-Za-z])|\\leqslant(?![A-Za-z])", r"\\le"),
        (r"\\neq(?![A-Za-z])", r"\\ne"),
        (r"\\rightarrow(?![A-Za-z])", r"\\to"),
        (r"\\(?:left|right|[bB]igg?[lr]?)(?![A-Za-z])\s*\.?", ""),
        (r"\\(?:displaystyle|textstyle|limits)(?![A-Za-z])", ""),
        (r"\\degrees?(?![A-Za-z])|\^\s*\\circ(?![A-Za-z])|\^\s*\{\s*\\circ\s*\}", r"^{\\circ}"),
        (r"\{,\}|,\\!", ","),
        (r"(?<=\d)\\[,;:! ](?=\d{3}(?!\d))", ","),
        (r"\\[,;: ]|\\quad(?![A-Za-z])|\\qquad(?![A-Za-z])|~|\\\\(?![A-Za-z])", " "),
        (r"\\!", ""),
    )
]
_TYPE = (
    r"\\(?:text|textbf|textit|textrm|textsf|texttt|textnormal|mathrm|mathbf|mathit|mathsf|mbox|"
    r"operatorname|boldsymbol|bm|ce|emph|underline|boxed|fbox)\s*"
)
_TYPE_COMMAND = re.compile(_TYPE + r"(?=\{)")
_TYPED = re.compile(_TYPE + r"\{([^{}]*)\}")
_LEAD = re.compile(
    r"(?:so|thus|hence|therefore)?,?\s*"
    r"(?:(?:the|my)\s+)?(?:(?:final|correct|right)\s+)*(?:answer|option|choice|result)"
    r"(?:\s+is\s*:?|\s*[:=]|\s+(?=\(?[A-Z](?![A-Za-z])))\s*",
    re.I,
)
_APPROXIMATE = re.compile(r"(?:\\approx(?![A-Za-z])|=)\s*")
_ABBREVIATED = re.compile(r"\b[A-Za-z]\.[A-Za-z]\.$")  # p.m. keeps its stops


def normal(answer: str) -> str:
    """The answer in ASCII LaTeX where there is one, without wrappers around all of it."""
    text = _FRACTION.sub(_vulgar, answer)
    text = _RAISED_RUN.sub(lambda m: "^{" + "".join(_RAISED[c] for c in m[0]) + "}", text)
    text = _LOWERED_RUN.sub(lambda m: "_{" + "".join(_LOWERED[c] for c in m[0]) + "}", text)
    text = text.translate(_TABLE)
    text = _ROOT_OF.sub(lambda m: f"{m[1]}{{{m[2] or m[3] or ''}}}", text)
    for pattern, by in _SYNONYMS:
        text = pattern.sub(by, text)
    return unwrapped(" ".join(text.split()))


def flat(text: str) -> str:
    """Without commands that set type, for people to read: `\\text{12 cm}^2` → `12 cm^2`."""
    for _ in range(4):  # they seldom stand inside each other
        text, n = _TYPED.subn(r" \1 ", text)
        if not n:
            break
    text = re.sub(r"\s+([\^_.,;:!?)])", r"\1", text)
    return unwrapped(" ".join(text.split()))


def without_spaces(text: str) -> str:
    """Without the spaces that part nothing: those between two letters or digits stay."""
    return re.sub(r"(?<![A-Za-z0-9]) | (?![A-Za-z0-9])", "", text)


def unwrapped(text: str) -> str:
    """Without $…$, \\text{…}, {…}, **…**, <answer>…</answer>, `Answer:` and the full stop."""
    while text != (inner := _unwrapped_once(text)):
        text = inner
    return text


def _unwrapped_once(text: str) -> str:
    text = text.strip()
    for opening, closing in (
        ("$$", "$$"),
        ("$", "$"),
        ("\\(", "\\)"),
        ("\\[", "\\]"),
        ("**", "**"),
        ("__", "__"),
        ("`", "`"),
        ('"', '"'),
        ("<answer>", "</answer>"),
    ):
        n, end = len(opening), len(text) - len(closing)
        if end > n and text.startswith(opening) and text.endswith(closing):
            inner = text[n:end]
            if opening not in inner and closing not in inner:
                return inner
    command = _TYPE_COMMAND.match(text)
    start = command.end() if command else 0
    if text[start : start + 1] == "{" and _closes_at_end(text, start):
        return text[start + 1 : -1]
    stops = len(text) > 1 and text[-1] in ".;," and not text.endswith(("..", "\\.", "\\,", "\\;"))
    if stops and not _ABBREVIATED.search(text, max(0, len(text) - 8)):
        return text[:-1]
    for lead in (_LEAD, _APPROXIMATE):
        if (match := lead.match(text)) and match.end() < len(text):
            return text[match.end() :]
    return text


def _closes_at_end(text: str, start: int) -> bool:
    depth = 0
    for match in re.compile(r"\\.|[{}]", re.S).finditer(text, start):
        depth += {"{": 1, "}": -1}.get(match[0], 0)
        if depth == 0:
            return match.end() == len(text)
    return False


def _vulgar(match: re.Match[str]) -> str:
    over, under = unicodedata.normalize("NFKD", match[0]).split("⁄")
    return f"\\frac{{{over}}}{{{under}}}"
