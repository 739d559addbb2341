"""The small world must be unambiguous: a prompt built from it may have one right answer only."""

from mi_utils.smallworld import lexicon


def test_every_name_has_one_gender():
    assert not set(lexicon.MALE_NAMES) & set(lexicon.FEMALE_NAMES)
    assert len(set(lexicon.NAMES)) == len(lexicon.NAMES) >= 100


def test_each_country_has_one_row_and_its_own_capital():
    assert len({c.name for c in lexicon.COUNTRIES}) == len(lexicon.COUNTRIES) >= 36
    assert len({c.capital for c in lexicon.COUNTRIES}) == len(lexicon.COUNTRIES)


def test_no_capital_is_a_name_of_a_person_or_a_country():
    people_and_countries = set(lexicon.NAMES) | {c.name for c in lexicon.COUNTRIES}
    assert not {c.capital for c in lexicon.COUNTRIES} & people_and_countries


def test_singular_and_plural_verbs_take_the_same_words():
    assert all(lexicon.AFTER_VERB[one] == lexicon.AFTER_VERB[many] for one, many in lexicon.VERB_FORMS)


def test_sentiment_words_have_one_polarity():
    for words in (lexicon.SENTIMENT_ADJECTIVES, lexicon.SENTIMENT_VERBS):
        assert not set(words["positive"]) & set(words["negative"])


def test_words_are_listed_once_and_are_single_words():
    words = lexicon.words()
    assert len(words) == len(set(words))
    assert all(word.isalpha() for word in words)
