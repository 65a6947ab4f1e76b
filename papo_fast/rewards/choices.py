"""Answers of a multiple choice: which letters an answer chooses."""

from __future__ import annotations

import re

_REFERENCE = re.compile(
    r"(?:option|choice|answer)?\s*"
    r"(?:[(\[]\s*(?P<closed>[A-Za-z])\s*[)\]][.:]?|(?P<bare>[A-Z])(?P<mark>[).:]?))"
    r"(?P<text>.*)",
    re.I | re.S,
)
_SEVERAL = re.compile(
    r"[(\[]?[A-Z][)\].]?(?:\s*(?:[,;/&+、]|,?\s*\band\b)\s*[(\[]?[A-Z][)\].]?)+\.?", re.S
)
_RUN = re.compile(r"[A-F]{2,6}")
_MARKED = re.compile(
    r"(?:[(\[]\s*([A-Za-z])\s*[)\]][.:]?|([A-Za-z])(?:\)[.:]?|\.(?!\d)|:))\s*(.*)", re.S
)
_BARE = re.compile(r"([A-Za-z])(?![A-Za-z0-9'’^_=+*/<>(-]|\s*[=+*/<>^])\s*(.*)", re.S)
_LETTER = re.compile(
    r"(?<![A-Za-z0-9\\_^{])(?:[(\[]\s*([A-Za-z])\s*[)\]]|([A-Z]))(?![A-Za-z0-9'_^])"
)
_DENIED = re.compile(
    r"(?:\bnot\s+(?:option\s+)?|\bneither\s+|\bnor\s+|\brather than\s+|\binstead of\s+)"
    r"[(\[]?[A-Z][)\]]?(?![A-Za-z])"
    r"|(?<![A-Za-z])[(\[]?[A-Z][)\]]?\s+(?:is|was|seems|looks|would be|must be|can be|cannot be|"
    r"can't be|isn't)(?: (?:definitely|clearly|obviously|probably))?"
    r" ?(?:wrong|incorrect|false|not\b[^,.;]*|excluded|eliminated|impossible|out\b)?",
    re.I,
)
_WRONG = re.compile(
    r"not|n't|wrong|incorrect|false|excluded|eliminated|impossible|\bout\b|nor|neither|rather|instead",
    re.I,
)
_HEDGE = re.compile(
    r"^(?:or|and|,|;|/|&)\s*[(\[]?[A-Z](?![A-Za-z0-9])"
    r"|^[(\[]?[A-Z][)\].:]"
    r"|(?:\bor|\band|[,;/&])\s*(?:[(\[]\s*[A-Z]\s*[)\]]|[A-Z][).:])"
    r"|(?<![A-Z])[,;]?\s+(?:or|and)\s+[A-Z]$"
)
_REASON = re.compile(r"[,;.]?\s*\b(?:because|since|as)\b.*", re.I | re.S)


def choice(reference: str) -> tuple[str, str] | None:
    """The letter of a reference `B`, `B.`, `(B) 12`, and its text; None if it is no choice."""
    match = _REFERENCE.fullmatch(reference)
    if match is None:
        return None
    letter, text = match["closed"] or match["bare"], match["text"].strip()
    if match["bare"] and (not letter.isupper() or (text and not match["mark"])):
        return None
    if text and (letter.upper() > "J" or chosen(reference) != {letter.upper()}):
        return None  # I. Newton is a name, and (a) + (b) a sum
    return letter.upper(), text


def choices(reference: str) -> set[str] | None:
    """The letters of a reference that chooses several: `A, C`, `(A) and (C)`, `AC`."""
    if _RUN.fullmatch(reference) and list(reference) == sorted(set(reference)):
        return set(reference)
    if _SEVERAL.fullmatch(reference):
        return set(re.findall(r"(?<![A-Za-z])[A-Z](?![A-Za-z])", reference))
    return None


def chosen(answer: str) -> set[str]:
    """The letters that an answer chooses; more than one where it does not decide."""
    answer = answer.strip().strip("*").strip()
    answer = re.sub(
        r"^(?:the\s+)?(?:correct\s+)?(?:option|choice|answer)\s*(?:is)?\s*:?\s*(?=[(\[]?[A-Za-z](?![A-Za-z]))",
        "",
        answer,
        flags=re.I,
    )
    if len(answer) > 2000:
        return set()
    if match := _MARKED.fullmatch(answer):
        text = match[3]
        if not _HEDGE.search(text):
            return {(match[1] or match[2]).upper()}
        return {(match[1] or match[2]).upper()} | _letters(text)
    if _RUN.fullmatch(answer):
        return set(answer)
    match = _BARE.fullmatch(answer)
    if match is None:
        return _letters(answer) if _DENIED.search(answer) else set()
    letter, text = match[1], match[2]
    if letter in "Aa" and re.match(r"[a-z]{2,}", text) and not _follows(text):
        return set()  # the article: a triangle
    if letter.islower() and re.match(r"[A-Za-z]{2,}", text) and not _follows(text):
        return set()
    return _letters(letter.upper() + " " + text)


def _follows(text: str) -> bool:
    return bool(re.match(r"(?:is|are|was|because|since|as|or|and|not)\b", text))


def _letters(text: str) -> set[str]:
    """Letters that stand alone, less those that the text denies. A reason may name others."""
    denied = [m for m in _DENIED.finditer(text) if _WRONG.search(m[0])]
    for match in reversed(denied):
        text = text[: match.start()] + " " + text[match.end() :]
    text = _REASON.sub("", text)
    return {(m[1] or m[2]).upper() for m in _LETTER.finditer(text) if m[0] != "I" or text == "I"}
