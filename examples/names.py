"""The names of one_to_many.py, by language or by whatever category a file gives."""

import importlib
import random

import common
from common import InputError

LANGUAGES = dict(
    Croatian="hr_HR", Dutch="nl_NL", English="en_US", Estonian="et_EE", Finnish="fi_FI",
    French="fr_FR", German="de_DE", Indian="en_IN", Irish="ga_IE", Italian="it_IT",
    Slovak="sk_SK", Spanish="es_ES", Swedish="sv_SE", Zulu="zu_ZA",
)  # fmt: skip
LARGEST, LONGEST = 800, 20  # names of a category, letters of a name


def read_names(path):
    """{category: [name, ...]}, every name once, in an order that is random and always the same."""
    found = {}
    if path is None:
        common.require(faker="Faker")
        for language, locale in LANGUAGES.items():
            try:
                provider = importlib.import_module(f"faker.providers.person.{locale}").Provider
            except ImportError:
                raise InputError(
                    f"this Faker has no {language} names; pip install --upgrade Faker"
                ) from None
            found[language] = set(provider.last_names)
    else:
        for number, line in enumerate(common.read_text(path)[0].splitlines(), 1):
            category, tab, name = line.partition("\t")
            if not (category and tab and name):
                raise InputError(f"{path}, line {number}, is not: category, tab, name; mend it")
            found.setdefault(category, set()).add(name)
    found = {c: sorted(name for name in found[c] if len(name) < LONGEST) for c in sorted(found)}
    for category, names in found.items():
        random.Random(0).shuffle(names)
        if len(names) < 20:
            raise InputError(f"{category} has {len(names)} names shorter than 20; give 20 or more")
    return {category: names[:LARGEST] for category, names in found.items()}
