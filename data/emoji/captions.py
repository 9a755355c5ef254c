"""Emoji names turned into short English captions: articles, plurals, and names that are no noun.

`caption("red apple", "food-drink")` -> "a red apple". Rules do most of the work; the tables hold
what they would get wrong.
"""

import re

WHOLE = {  # taken as they stand
    "OK hand": "an OK hand sign",
    "Tokyo tower": "Tokyo Tower",
    "ZZZ": "the letters ZZZ",
    "american football": "an American football",
    "backhand index pointing down": "a hand pointing down",
    "backhand index pointing left": "a hand pointing left",
    "backhand index pointing right": "a hand pointing right",
    "backhand index pointing up": "the back of a hand pointing up",
    "badminton": "a badminton racket and shuttlecock",
    "biting lip": "a mouth biting its lip",
    "bowling": "a bowling ball and pins",
    "breast-feeding": "a woman breast-feeding a baby",
    "bullseye": "a bullseye target",
    "call me hand": "a call me hand sign",
    "camping": "a tent at a camping site",
    "chart decreasing": "a falling chart",
    "chart increasing": "a rising chart",
    "chart increasing with yen": "a rising chart with a yen sign",
    "collision": "a collision burst",
    "construction": "a construction barrier",
    "cooked rice": "a bowl of cooked rice",
    "cooking": "a frying pan with an egg",
    "curry rice": "a plate of curry rice",
    "dashing away": "a puff of dust",
    "dizzy": "a dizzy star",
    "dna": "a DNA strand",
    "dvd": "a DVD",
    "face with hand over mouth": "a face with a hand over its mouth",
    "face with open eyes and hand over mouth": "a face with open eyes and a hand over its mouth",
    "face with steam from nose": "a face with steam from its nose",
    "face with symbols on mouth": "a face with symbols on its mouth",
    "ferris wheel": "a Ferris wheel",
    "field hockey": "a field hockey stick and ball",
    "flag in hole": "a golf flag in a hole",
    "foggy": "a foggy city",
    "four leaf clover": "a four-leaf clover",
    "globe showing Americas": "a globe showing the Americas",
    "globe showing Asia-Australia": "a globe showing Asia and Australia",
    "globe showing Europe-Africa": "a globe showing Europe and Africa",
    "hand with fingers splayed": "a hand with the fingers splayed",
    "head shaking horizontally": "a face shaking its head",
    "head shaking vertically": "a face nodding its head",
    "headphone": "headphones",
    "herb": "an herb",
    "high voltage": "a high voltage bolt",
    "hindu temple": "a Hindu temple",
    "horse racing": "a jockey on a racing horse",
    "hot springs": "a hot spring",
    "hourglass done": "an hourglass that has run out",
    "hourglass not done": "an hourglass still running",
    "hundred points": "a hundred points mark",
    "ice hockey": "an ice hockey stick and puck",
    "index pointing at the viewer": "a hand pointing at the viewer",
    "index pointing up": "a hand pointing up",
    "kaaba": "the Kaaba",
    "kiss": "two people kissing",
    "kiss: man, man": "two men kissing",
    "kiss: woman, man": "a woman and a man kissing",
    "kiss: woman, woman": "two women kissing",
    "couple with heart: man, man": "two men with a heart",
    "couple with heart: woman, man": "a woman and a man with a heart",
    "couple with heart: woman, woman": "two women with a heart",
    "lacrosse": "a lacrosse stick and ball",
    "leaf fluttering in wind": "a leaf fluttering in the wind",
    "leafy green": "a leafy green vegetable",
    "light rail": "a light rail train",
    "link": "a chain link",
    "locked": "a locked padlock",
    "locked with key": "a locked padlock with a key",
    "locked with pen": "a locked padlock with a pen",
    "man: bald": "a bald man",
    "meat on bone": "meat on a bone",
    "milky way": "the Milky Way",
    "mount fuji": "Mount Fuji",
    "night with stars": "a city at night with stars",
    "oden": "a skewer of oden",
    "palms up together": "two palms held up together",
    "person: bald": "a bald person",
    "ping pong": "a ping pong paddle and ball",
    "raised back of hand": "the back of a raised hand",
    "rolling on the floor laughing": "a laughing face rolling on the floor",
    "selfie": "a hand taking a selfie",
    "shinto shrine": "a Shinto shrine",
    "Statue of Liberty": "the Statue of Liberty",
    "spaghetti": "a plate of spaghetti",
    "skull and crossbones": "a skull and crossbones",
    "speaker high volume": "a speaker at high volume",
    "speaker low volume": "a speaker at low volume",
    "speaker medium volume": "a speaker at medium volume",
    "star-struck": "a star-struck face",
    "sunrise": "a sunrise over water",
    "sunset": "a sunset over a city",
    "sushi": "a piece of sushi",
    "tennis": "a tennis racket and ball",
    "umbrella on ground": "an umbrella on the ground",
    "unlocked": "an unlocked padlock",
    "vulcan salute": "a Vulcan salute",
    "wedding": "a wedding chapel",
    "woman: bald": "a bald woman",
    "x-ray": "an X-ray",
}
BARE = {  # stuff and proper names: no article
    *("bacon", "bread", "broccoli", "butter", "coral", "fire", "flatbread", "fog", "garlic"),
    *("ice", "luggage", "mate", "money", "popcorn", "salt", "soap", "thread", "wood"),
    *("yarn", "Mrs. Claus", "Mx Claus", "Santa Claus", "baguette bread", "bubble tea"),
    *("building construction", "canned food", "ice cream", "nail polish", "pouring liquid"),
    *("shaved ice", "soft ice cream", "stuffed flatbread"),
}
MASS = {"bed", "crossed", "fear", "fire", "joy", "lightning", "rain", "silhouette", "snow", "sweat"}
ONE = {  # these end in -s, yet are one thing
    *("bus", "cactus", "compass", "hibiscus", "hippopotamus", "lotus", "minibus", "octopus"),
    *("rhinoceros", "trolleybus"),
}
VOWEL = re.compile(r"[aeiou]|hour|x-ray|ATM|SOS|NG\b", re.IGNORECASE)
CONSONANT = re.compile(r"uni|uti|euro|ewe|one-", re.IGNORECASE)
SPLIT = re.compile(r" (?:with|without|of|on|in|at|behind|over|showing|facing) ")
SECOND = re.compile(  # what follows these words may want an article of its own
    r"\b(with|without|in|on|behind|wearing|feeding|tipping|raising|getting|rowing|bouncing|taking)"
    r" (?!a |the )(.+)$"
)
SIGNS = ("arrow", "button", "sign", "square", "circle", "diamond", "symbol", "mark")


def _article(words: str) -> str:
    """'apple' -> 'an apple'."""
    an = VOWEL.match(words) and not CONSONANT.match(words)
    return f"{'an' if an else 'a'} {words}"


def _is_plural(words: str) -> bool:
    """Whether the noun before 'with', 'of' and so on is a plural."""
    head = SPLIT.split(words)[0].split()
    if head[0] in {"man", "woman", "person", "face"}:  # 'man lifting weights'
        return False
    if head[0] in {"men", "women", "people", "two"}:
        return True
    return head[-1].endswith("s") and not head[-1].endswith(("ss", "’s")) and head[-1] not in ONE


def _second(words: str) -> str:
    """'house with garden' -> 'house with a garden'."""

    def add(match: re.Match[str]) -> str:
        link, rest = match.groups()
        bare = _is_plural(rest) or rest.split()[-1] in MASS
        return f"{link} {rest if bare else _article(rest)}"

    return SECOND.sub(add, words)


def _noun_phrase(words: str) -> str:
    if SPLIT.split(words)[0] in BARE:
        return _second(words)
    return _second(words) if _is_plural(words) else _article(_second(words))


def _people(names: list[str]) -> str:
    """['man', 'woman', 'girl', 'girl'] -> 'a man, a woman and two girls'."""
    many = {"man": "men", "woman": "women", "child": "children"}
    *first, last = (
        f"two {many.get(name, name + 's')}" if names.count(name) == 2 else _article(name)
        for name in dict.fromkeys(names)
    )
    return f"{', '.join(first)} and {last}" if first else last


def _with_colon(kind: str, what: str) -> str:
    """'person: beard', 'family: man, boy', 'man running: facing right', 'keycap: 3'."""
    if kind == "family":
        return f"a family of {_people(what.split(', '))}"
    if kind == "keycap":
        return f"a keycap with {what}"
    if what.startswith("facing"):
        return f"{_noun_phrase(kind)}, {what}"
    return f"{_article(kind)} with {'a beard' if what == 'beard' else what}"


def _symbol(name: str) -> str:
    name = name.removesuffix(" (blood type)")
    return _article(name) if name.endswith(SIGNS) else f"the {name} symbol"


def caption(name: str, group: str) -> str:
    """A short English phrase for the emoji called `name` in emojibase's `group`."""
    if name in WHOLE:
        text = WHOLE[name]
    elif ": " in name:
        text = _with_colon(*name.split(": ", 1))
    elif group == "symbols":
        text = _symbol(name)
    elif name.endswith("o’clock"):
        text = f"a clock at {name}"
    elif name.endswith("-thirty"):
        text = f"a clock at half past {name.removesuffix('-thirty')}"
    else:
        text = _noun_phrase(name)
    return text.translate(str.maketrans("’“”", '\'""'))
