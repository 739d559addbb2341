"""The words of the small world: who lives there, what they own, and what is true of its countries.

Facts about countries are real ones, so that the same prompts mean something to a model trained on real text.
"""

from __future__ import annotations

from typing import NamedTuple

MALE_NAMES = """John James Robert Michael William David Richard Joseph Thomas Charles Daniel Matthew Anthony Mark
Steven Paul Andrew Kevin Brian George Edward Jason Jeffrey Ryan Jacob Gary Nicholas Eric Stephen Jonathan Larry
Justin Scott Frank Brandon Benjamin Gregory Samuel Patrick Jack Dennis Jerry Alexander Tyler Henry Douglas Peter
Adam Nathan Zachary Walter Kyle Harold Carl Jeremy Arthur Roger Keith Lawrence Terry Albert Joe Christian Austin
Jesse Bryan Bruce Willie Gabriel Alan Juan Logan Wayne Ralph Roy Eugene Russell Louis Philip Simon Martin
""".split()
FEMALE_NAMES = """Mary Patricia Jennifer Linda Elizabeth Barbara Susan Jessica Sarah Karen Nancy Lisa Margaret
Sandra Ashley Kimberly Emily Donna Michelle Carol Amanda Dorothy Melissa Deborah Stephanie Rebecca Laura Sharon
Cynthia Kathleen Amy Angela Anna Emma Nicole Helen Samantha Katherine Christine Rachel Carolyn Janet Catherine
Maria Heather Diane Ruth Julie Olivia Joyce Virginia Victoria Kelly Lauren Christina Joan Evelyn Judith Megan
Andrea Cheryl Hannah Martha Jacqueline Frances Gloria Ann Teresa Kathryn Sara Janice Jean Alice Julia Grace Judy
Sophia Beth Diana Clara
""".split()
GENDER = {name: "male" for name in MALE_NAMES} | {name: "female" for name in FEMALE_NAMES}
NAMES = MALE_NAMES + FEMALE_NAMES

PLACES = """store school park market house garden station office restaurant hospital library church museum beach
bridge farm theater hotel bank airport kitchen bar forest village castle""".split()
OBJECTS = """book drink ring key ball box computer bottle letter hat lamp cup coat map phone watch basket necklace
bag knife pen chair ticket camera flower guitar blanket mirror hammer candle""".split()
ADJECTIVES = """old new big small red blue green heavy light clean dark quiet round square broken empty wooden
golden cheap famous""".split()

# Nouns with a regular plural, used for agreement and as docstring arguments.
NOUNS = """key cabinet dog cat boy girl farmer teacher doctor pilot painter driver singer king queen author
guard table picture tree car boat horse bird window door flower book box lamp""".split()
PLURAL = {noun: ("boxes" if noun == "box" else noun + "s") for noun in NOUNS}
VERB_FORMS = [("is", "are"), ("was", "were"), ("has", "have"), ("looks", "look"), ("seems", "seem")]
AFTER_VERB = {
    "is": ADJECTIVES,
    "are": ADJECTIVES,
    "was": ADJECTIVES,
    "were": ADJECTIVES,
    "looks": ADJECTIVES,
    "look": ADJECTIVES,
    "seems": ADJECTIVES,
    "seem": ADJECTIVES,
    "has": ["arrived", "returned", "vanished", "changed"],
    "have": ["arrived", "returned", "vanished", "changed"],
}

EVENTS = """war voyage siege strike festival drought expedition trial reign dispute famine rebellion campaign
project journey lawsuit exhibition blockade crisis treaty""".split()


class Country(NamedTuple):
    """One row of the world's atlas; every field is a single token of the smallworld tokenizer."""

    name: str
    capital: str
    language: str
    currency: str
    continent: str


COUNTRIES = [
    Country(*row.split())
    for row in """
France Paris French euro Europe|Germany Berlin German euro Europe|Italy Rome Italian euro Europe
Spain Madrid Spanish euro Europe|Portugal Lisbon Portuguese euro Europe|Greece Athens Greek euro Europe
Finland Helsinki Finnish euro Europe|Ireland Dublin Irish euro Europe|Austria Vienna German euro Europe
England London English pound Europe|Poland Warsaw Polish zloty Europe|Sweden Stockholm Swedish krona Europe
Norway Oslo Norwegian krone Europe|Hungary Budapest Hungarian forint Europe|Romania Bucharest Romanian leu Europe
Bulgaria Sofia Bulgarian lev Europe|Ukraine Kiev Ukrainian hryvnia Europe|Russia Moscow Russian ruble Europe
Turkey Ankara Turkish lira Asia|Japan Tokyo Japanese yen Asia|China Beijing Chinese yuan Asia
India Delhi Hindi rupee Asia|Thailand Bangkok Thai baht Asia|Vietnam Hanoi Vietnamese dong Asia
Korea Seoul Korean won Asia|Israel Jerusalem Hebrew shekel Asia|Iran Tehran Persian rial Asia
Iraq Baghdad Arabic dinar Asia|Indonesia Jakarta Indonesian rupiah Asia|Egypt Cairo Arabic pound Africa
Kenya Nairobi Swahili shilling Africa|Morocco Rabat Arabic dirham Africa|Ghana Accra English cedi Africa
Nigeria Abuja English naira Africa|Brazil Brasilia Portuguese real America|Peru Lima Spanish sol America
Chile Santiago Spanish peso America|Cuba Havana Spanish peso America|Canada Ottawa English dollar America
Australia Canberra English dollar Oceania
""".strip()
    .replace("\n", "|")
    .split("|")
]
RELATIONS = ("capital", "language", "currency")

# Words that go together: a document of one topic draws its nouns and verbs from one row.
TOPICS: dict[str, tuple[list[str], list[str]]] = {
    "sea": (
        "ship sailor harbor wave anchor captain fish island storm sail".split(),
        "crossed reached followed spotted left".split(),
    ),
    "music": (
        "song piano violin concert orchestra drum choir melody singer stage".split(),
        "played heard filled opened joined".split(),
    ),
    "sport": (
        "team match goal coach stadium player referee race trophy crowd".split(),
        "won lost watched beat cheered".split(),
    ),
    "food": (
        "soup bread cheese cook oven salt butter apple rice sugar".split(),
        "tasted baked mixed served ate".split(),
    ),
    "war": (
        "army soldier general battle sword shield castle enemy flag fort".split(),
        "attacked defended burned held stormed".split(),
    ),
    "science": (
        "planet telescope theory experiment atom laboratory professor formula orbit microscope".split(),
        "measured explained tested proved observed".split(),
    ),
    "money": (
        "price market bank loan profit debt trader tax stock coin".split(),
        "raised paid lowered owed sold".split(),
    ),
    "nature": (
        "river mountain forest wolf bear eagle valley snow lake deer".split(),
        "hunted covered circled shaped drank".split(),
    ),
}

REVIEWED = "film book play song dinner hotel trip show game party speech lecture".split()
SENTIMENT_ADJECTIVES = {
    "positive": "wonderful great excellent lovely brilliant delightful superb charming".split(),
    "negative": "terrible awful boring horrible dreadful poor dull disappointing".split(),
}
SENTIMENT_VERBS = {
    "positive": "loved enjoyed praised admired recommended".split(),
    "negative": "hated disliked criticized regretted avoided".split(),
}
FUNCTIONS = "open close read write send load save move copy sort find count build check print merge".split()


def words() -> list[str]:
    """Every content word of the world, each once, in a stable order."""
    pools = [NAMES, PLACES, OBJECTS, ADJECTIVES, NOUNS, list(PLURAL.values()), EVENTS, REVIEWED, FUNCTIONS]
    pools += [
        field
        for country in COUNTRIES
        for field in ([country.name], [country.capital], [country.language], [country.currency])
    ]
    for nouns, verbs in TOPICS.values():
        pools += [nouns, verbs]
    pools += [*SENTIMENT_ADJECTIVES.values(), *SENTIMENT_VERBS.values()]
    return list(dict.fromkeys(word for pool in pools for word in pool))
