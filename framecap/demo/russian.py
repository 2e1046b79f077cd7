"""Correct Russian for a scene, and the way back: the parser reads from a caption what it claims.

Gender, number and case agree: «Ночью по мосту едет красный автобус, слева растёт жёлтое дерево».
After два and три the noun stands in the genitive singular; the adjective in the genitive plural, after a
feminine noun in the nominative plural (Розенталь, «Справочник по правописанию и стилистике», § 193).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from framecap.demo.scenes import FLYING_KINDS, MOVING_KINDS, Scene, Thing

T = TypeVar("T")


@dataclass(frozen=True)
class Noun:
    """Nominative, genitive and instrumental singular, gender (m, f, n), and how the thing is: «стоит»."""

    nominative: str
    genitive: str
    instrumental: str
    gender: str
    verb: str


NOUNS: dict[str, Noun] = {
    "bus": Noun("автобус", "автобуса", "автобусом", "m", "стоит"),
    "car": Noun("машина", "машины", "машиной", "f", "стоит"),
    "truck": Noun("грузовик", "грузовика", "грузовиком", "m", "стоит"),
    "bicycle": Noun("велосипед", "велосипеда", "велосипедом", "m", "стоит"),
    "boat": Noun("лодка", "лодки", "лодкой", "f", "стоит"),
    "house": Noun("дом", "дома", "домом", "m", "стоит"),
    "tree": Noun("дерево", "дерева", "деревом", "n", "растёт"),
    "flower": Noun("цветок", "цветка", "цветком", "m", "растёт"),
    "dog": Noun("собака", "собаки", "собакой", "f", "стоит"),
    "cat": Noun("кошка", "кошки", "кошкой", "f", "сидит"),
    "horse": Noun("лошадь", "лошади", "лошадью", "f", "стоит"),
    "duck": Noun("утка", "утки", "уткой", "f", "стоит"),
    "ball": Noun("мяч", "мяча", "мячом", "m", "лежит"),
    "umbrella": Noun("зонт", "зонта", "зонтом", "m", "стоит"),
    "armchair": Noun("кресло", "кресла", "креслом", "n", "стоит"),
    "tent": Noun("палатка", "палатки", "палаткой", "f", "стоит"),
    "person": Noun("человек", "человека", "человеком", "m", "стоит"),
    "flag": Noun("флаг", "флага", "флагом", "m", "стоит"),
    "bucket": Noun("ведро", "ведра", "ведром", "n", "стоит"),
    "mushroom": Noun("гриб", "гриба", "грибом", "m", "растёт"),
    "suitcase": Noun("чемодан", "чемодана", "чемоданом", "m", "стоит"),
    "bird": Noun("птица", "птицы", "птицей", "f", "летит"),
    "plane": Noun("самолёт", "самолёта", "самолётом", "m", "летит"),
    "balloon": Noun("воздушный шар", "воздушного шара", "воздушным шаром", "m", "летит"),
    "kite": Noun("воздушный змей", "воздушного змея", "воздушным змеем", "m", "летит"),
    "rocket": Noun("ракета", "ракеты", "ракетой", "f", "летит"),
}
COUNTED = {"balloon": "воздушных шара", "kite": "воздушных змея"}  # after два, три: adjective in the plural
MOVING_VERBS = {
    "bus": "едет", "car": "едет", "truck": "едет", "dog": "бежит", "horse": "скачет", "duck": "идёт",
    "person": "идёт",
}  # fmt: skip
PLURAL_VERBS = {
    "стоит": "стоят", "растёт": "растут", "сидит": "сидят", "лежит": "лежат", "летит": "летят",
    "едет": "едут", "бежит": "бегут", "скачет": "скачут", "идёт": "идут",
}  # fmt: skip
# masculine, feminine, neuter nominative; nominative plural; genitive plural; prepositional («в красном»)
ADJECTIVES: dict[str, tuple[str, str, str, str, str, str]] = {
    "red": ("красный", "красная", "красное", "красные", "красных", "красном"),
    "orange": ("оранжевый", "оранжевая", "оранжевое", "оранжевые", "оранжевых", "оранжевом"),
    "yellow": ("жёлтый", "жёлтая", "жёлтое", "жёлтые", "жёлтых", "жёлтом"),
    "green": ("зелёный", "зелёная", "зелёное", "зелёные", "зелёных", "зелёном"),
    "blue": ("синий", "синяя", "синее", "синие", "синих", "синем"),
    "violet": ("фиолетовый", "фиолетовая", "фиолетовое", "фиолетовые", "фиолетовых", "фиолетовом"),
    "white": ("белый", "белая", "белое", "белые", "белых", "белом"),
    "black": ("чёрный", "чёрная", "чёрное", "чёрные", "чёрных", "чёрном"),
}
# where a thing is; along what it moves; over what it flies
PLACES: dict[str, tuple[str, str, str]] = {
    "road": ("на дороге", "по дороге", "над дорогой"),
    "field": ("в поле", "по полю", "над полем"),
    "beach": ("на пляже", "по пляжу", "над пляжем"),
    "snow": ("на снегу", "по снегу", "над снегом"),
    "bridge": ("на мосту", "по мосту", "над мостом"),
    "city": ("в городе", "по городу", "над городом"),
}
NUMERALS = {1: {}, 2: {"m": "два", "f": "две", "n": "два"}, 3: {"m": "три", "f": "три", "n": "три"}}
TIMES = {"day": "днём", "night": "ночью"}
WEATHERS = {"clear": "", "rain": "в дождь", "snowfall": "в снегопад"}


def noun_phrase(thing: Thing) -> str:
    """«красный автобус», «две красные машины», «три красных дерева», «человек в красном»."""
    noun, adjective = NOUNS[thing.kind], ADJECTIVES[thing.colour]
    if thing.kind == "person":
        counted = noun.nominative if thing.count == 1 else f"{NUMERALS[thing.count]['m']} {noun.genitive}"
        return f"{counted} в {adjective[5]}"
    if thing.count == 1:
        return f"{adjective['mfn'.index(noun.gender)]} {noun.nominative}"
    plural = adjective[3] if noun.gender == "f" else adjective[4]
    return f"{NUMERALS[thing.count][noun.gender]} {plural} {COUNTED.get(thing.kind, noun.genitive)}"


def verb_phrase(thing: Thing) -> str:
    """«стоит», «едут»: by kind, motion and number."""
    verb = MOVING_VERBS[thing.kind] if thing.moving and thing.kind in MOVING_KINDS else NOUNS[thing.kind].verb
    return verb if thing.count == 1 else PLURAL_VERBS[verb]


def place_phrase(scene: Scene) -> str:
    """«на мосту», «по мосту», «над мостом»: by whether the main thing stands, moves or flies."""
    form = 2 if scene.main.kind in FLYING_KINDS else 1 if scene.main.moving else 0
    return PLACES[scene.setting][form]


def relation_phrase(scene: Scene, variant: int) -> str:
    """«слева» or «слева от автобуса», «над ним» or «над автобусом»: where the other thing is."""
    noun = NOUNS[scene.main.kind]
    if scene.relation in ("left", "right"):
        side = "слева" if scene.relation == "left" else "справа"
        return f"{side} от {noun.genitive}" if variant else side
    preposition = "над" if scene.relation == "above" else "перед"
    return f"{preposition} {noun.instrumental if variant else 'ней' if noun.gender == 'f' else 'ним'}"


def describe(scene: Scene, rng: np.random.Generator) -> str:
    """One correct sentence about the scene; the wording is drawn by lot."""
    when = " ".join(part for part in (TIMES[scene.time], WEATHERS[scene.weather]) if part)
    where, verb, main = place_phrase(scene), verb_phrase(scene.main), noun_phrase(scene.main)
    order = int(rng.choice(3, p=(0.7, 0.15, 0.15)))
    sentence = (
        f"{when} {where} {verb} {main}",
        f"{main} {verb} {where} {when}",
        f"{where} {when} {verb} {main}",
    )[order]
    if scene.other is not None:
        relation = relation_phrase(scene, int(rng.random() < 0.3))
        sentence += f", {relation} {verb_phrase(scene.other)} {noun_phrase(scene.other)}"
    return sentence[0].upper() + sentence[1:] + "."


@dataclass(frozen=True)
class Claims:
    """What a caption says; None where it says nothing that can be understood."""

    kind: str | None
    colour: str | None
    count: int | None
    relation: str | None
    other_kind: str | None
    other_colour: str | None
    setting: str | None
    time: str | None
    weather: str | None

    def essentials(self) -> tuple[str | None, ...]:
        """Kinds, colours, relation and setting."""
        return (self.kind, self.colour, self.relation, self.other_kind, self.other_colour, self.setting)


def claims_of(scene: Scene) -> Claims:
    """What a right caption of the scene says."""
    main, other = scene.main, scene.other
    return Claims(
        main.kind, main.colour, main.count, scene.relation,
        other.kind if other else None, other.colour if other else None,
        scene.setting, scene.time, scene.weather,
    )  # fmt: skip


_KIND_OF = {
    form.split()[-1]: kind
    for kind, noun in NOUNS.items()
    for form in (noun.nominative, noun.genitive, COUNTED.get(kind, noun.genitive))
}
_COLOUR_OF = {form: colour for colour, forms in ADJECTIVES.items() for form in forms}
_SETTING_OF = {form: setting for setting, forms in PLACES.items() for form in forms}
_COUNT_OF = {"два": 2, "две": 2, "три": 3}
_RELATION_OF = {"слева": "left", "справа": "right", "над": "above", "перед": "front"}


def _only(found: list[T]) -> T | None:
    return found[0] if len(found) == 1 else None


def _thing(words: list[str]) -> tuple[str | None, str | None]:
    """The one kind and the one colour among the words."""
    kinds = [_KIND_OF[word] for word in words if word in _KIND_OF]
    return _only(kinds), _only([_COLOUR_OF[word] for word in words if word in _COLOUR_OF])


def _clause_of_other(clause: str) -> tuple[str | None, str | None, str | None]:
    """Relation, kind and colour that the part after the comma claims."""
    words = clause.split()
    verbs = [i for i, word in enumerate(words) if word in PLURAL_VERBS]
    if not words or len(verbs) != 1:
        return None, None, None
    kind, colour = _thing(words[verbs[0] + 1 :])
    return _RELATION_OF.get(words[0]), kind, colour


def parse(caption: str) -> Claims:
    """What the caption claims. A second sentence part makes a relation; without one, ``relation`` is alone."""
    clauses = [part.strip() for part in caption.lower().rstrip(" .").split(",")]
    text = clauses[0]
    words = re.findall(r"[а-яё]+", text)
    kind, colour = _thing(words)
    settings = [setting for form, setting in _SETTING_OF.items() if re.search(rf"\b{form}\b", text)]
    relation: str | None = "alone"
    other_kind: str | None = None
    other_colour: str | None = None
    if len(clauses) == 2:
        relation, other_kind, other_colour = _clause_of_other(clauses[1])
    elif len(clauses) > 2:
        relation = None
    times = [time for time, form in TIMES.items() if form in words]
    weathers = [weather for weather, form in WEATHERS.items() if form and form.split()[-1] in words]
    counts = [_COUNT_OF[word] for word in words if word in _COUNT_OF]
    return Claims(
        kind, colour, _only(counts or [1]), relation, other_kind, other_colour,
        _only(settings), _only(times), _only(weathers or ["clear"]),
    )  # fmt: skip
