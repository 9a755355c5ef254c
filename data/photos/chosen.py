"""The photographs that were chosen, by eye, and what they show; `build.py` makes the set of them.

`RESOURCE`: pictures of the Debian package gcompris-qt-data, whose resource files hold a README
with the author, the source and the licence of each. `SINGLE`: pictures of the other packages, with
what their own documentation says. The rest of those packages was left out; the card says why.
"""

from typing import NamedTuple


class Single(NamedTuple):
    """A picture of a package that has no table of its own."""

    package: str
    path: str  # in the package
    author: str
    licence: str
    url: str  # where the package says it is from; "" where it does not say
    title: str


# folder of activities -> picture's name there -> what it shows, the caption of its crops
RESOURCE = {
    "erase/resource": {
        "pika": "a pika with a twig on a rock",
        "giraffe": "the head of a giraffe",
        "kingfisher": "a kingfisher on a branch",
        "chamaeleon": "a chameleon on a branch",
        "gibbon": "a gibbon in a tree",
        "crab": "a red crab on a rock",
        "bee": "a bee flying to red flowers",
        "kitten": "a kitten looking over a plank",
        "red_panda": "a red panda on a branch",
    },
    "explore_farm_animals/resource/animals": {
        "dog": "a German shepherd dog",
        "cow": "a cow on a meadow",
        "cat": "a cat with a ball of wool",
        "chicken": "four chickens on the grass",
        "horse": "horses under a blue sky",
        "duck": "a white duck at a dark pond",
        "sheep": "a sheep on the grass",
    },
    "explore_monuments/resource": {
        "usa/canyondeChelly": "a river in a canyon",
        "usa/lincolnMemorial": "the Lincoln Memorial at night",
        "usa/navajo": "cliff dwellings in red rock",
        "usa/mountRushmore": "Mount Rushmore",
        "usa/statueofLiberty": "the Statue of Liberty",
        "egypt/greatPyramidOfGiza": "the Great Pyramid of Giza",
        "india/greatStupa": "the Great Stupa at Sanchi",
        "india/konarkSunTemple": "the Sun Temple of Konark",
        "india/hawaMahal": "the Hawa Mahal in Jaipur",
        "india/rangGhar": "the Rang Ghar pavilion",
        "india/goldenTemple": "the Golden Temple in Amritsar",
        "india/qutubMinar": "the Qutb Minar through an arch",
        "france/chateaudeChambord": "Chambord castle",
        "france/pontduGard": "the Pont du Gard aqueduct",
        "france/reimsCathedral": "Reims cathedral",
        "france/eiffelTower": "the Eiffel Tower",
        "france/chateaudeChenonceau": "Chenonceau castle on its river",
        "france/montStMichel": "the Mont-Saint-Michel",
        "germany/berlinCathedral": "Berlin cathedral",
        "germany/brandenburgGate": "the Brandenburg Gate at dusk",
        "germany/neuschwansteinCastle": "Neuschwanstein castle",
        "wonders/machuPicchu": "Machu Picchu under clouds",
        "wonders/colosseum": "the Colosseum in Rome",
        "wonders/petra": "the Monastery of Petra",
        "wonders/greatWallofChina": "the Great Wall of China",
    },
    "explore_world_animals/resource/animals": {
        "koala": "a koala in a tree",
        "bison": "a bison on the prairie",
        "dragon": "a Komodo dragon on sand",
        "jaguar": "two jaguars on rocks",
        "hedgehog": "a hedgehog in the grass",
        "kangaroo": "a kangaroo and its joey",
        "moose": "a moose lying on a heath",
        "panda": "a giant panda",
        "lemur": "two ring-tailed lemurs",
        "polar_bear": "a polar bear in the snow",
        "scarlet_macaw": "a scarlet macaw",
    },
    "explore_world_music/resource/music": {
        "america": "a drum kit and a guitar",
        "africa": "three bata drums on the grass",
        "middleeast": "a long-necked lute",
    },
}

NAMES = {  # pictures whose name in the resource is long, unclear or means something else
    "chamaeleon": "chameleon",
    "dragon": "komodo_dragon",
    "america": "drum_kit",
    "africa": "bata_drums",
    "middleeast": "lute",
    "navajo": "cliff_dwellings",
    "chateaudeChambord": "chambord",
    "chateaudeChenonceau": "chenonceau",
    "neuschwansteinCastle": "neuschwanstein",
    "greatPyramidOfGiza": "great_pyramid",
    "greatWallofChina": "great_wall",
    "statueofLiberty": "statue_of_liberty",
    "montStMichel": "mont_saint_michel",
    "canyondeChelly": "canyon",
    "pontduGard": "pont_du_gard",
}

CC0, PUBLIC, BY2, BY4 = "CC0-1.0", "public-domain", "CC-BY-2.0", "CC-BY-4.0"
SKIMAGE, SKLEARN, LOMIRI = "scikit-image", "scikit-learn", "lomiri-wallpapers-16.04"
AITZOL = "Aitzol Berasategi"
SPACEX = "https://www.flickr.com/photos/spacexphotos/16511594820/"
HUBBLE = "http://hubblesite.org/newscenter/archive/releases/2012/37/image/a/"
GRAVEL = "https://cc0textures.com/view.php?tex=Gravel04"
CHINA = "https://www.flickr.com/photos/danielbuechele/6061409035/"
FLOWER = "https://www.flickr.com/photos/vultilion/6056698931/"

SINGLE = {
    "astronaut": Single(
        *(SKIMAGE, "skimage/data/astronaut.png", "NASA", PUBLIC, "https://flic.kr/p/r9qvLn"),
        "the astronaut Eileen Collins",
    ),
    "camera": Single(
        *(SKIMAGE, "skimage/data/camera.png", "Lav Varshney", CC0, ""),
        "a man behind a camera, in grey",
    ),
    "chelsea": Single(
        *(SKIMAGE, "skimage/data/chelsea.png", "Stefan van der Walt", CC0, ""),
        "the face of a cat",
    ),
    "coffee": Single(
        *(SKIMAGE, "skimage/data/coffee.png", "Rachel Michetti", CC0, ""),
        "a cup of coffee on a wooden table",
    ),
    "rocket": Single(
        *(SKIMAGE, "skimage/data/rocket.jpg", "SpaceX", PUBLIC, SPACEX),
        "a rocket on its launch pad",
    ),
    "hubble": Single(
        *(SKIMAGE, "skimage/data/hubble_deep_field.jpg", "NASA", PUBLIC, HUBBLE),
        "galaxies in deep space",
    ),
    "gravel": Single(
        *(SKIMAGE, "skimage/data/gravel.png", "CC0Textures", CC0, GRAVEL),
        "gravel, in grey",
    ),
    "china": Single(
        *(SKLEARN, "sklearn/datasets/images/china.jpg", "danielbuechele", BY2, CHINA),
        "a Chinese pagoda above a lake",
    ),
    "flower": Single(  # its note names danielbuechele, its link leads to vultilion: both are named
        *(SKLEARN, "sklearn/datasets/images/flower.jpg", "vultilion, danielbuechele", BY2, FLOWER),
        "an orange dahlia",
    ),
    "mountain_meadow": Single(
        *(LOMIRI, "aitzgorri_by_Aitzol_Berasategi.jpg", AITZOL, BY4, ""),
        "a mountain above a meadow",
    ),
    "spaniels": Single(
        *(LOMIRI, "friends_by_Aitzol_Berasategi.jpg", AITZOL, BY4, ""),
        "two spaniels on a wooden balcony",
    ),
    "stream": Single(
        *(LOMIRI, "life_by_Aitzol_Berasategi.jpg", AITZOL, BY4, ""),
        "a stream in a wood",
    ),
    "mountain_path": Single(
        *(LOMIRI, "picosdeeuropa_by_Aitzol_Berasategi.jpg", AITZOL, BY4, ""),
        "a path below rocky mountains",
    ),
    "sunrise": Single(
        *(LOMIRI, "sunset_by_Aitzol_Berasategi.jpg", AITZOL, BY4, ""),
        "a low sun over a hilltop",
    ),
    "fig": Single(
        *(LOMIRI, "Picture_0B_by_freespace.jpg", 'Trevor "Freespace"', BY4, ""),
        "half a fig in a red bowl",
    ),
    "brushes": Single(
        *(LOMIRI, "Picture_1A_by_freespace.jpg", 'Trevor "Freespace"', BY4, ""),
        "colourful paint brushes",
    ),
    "dandelions": Single(
        *(LOMIRI, "seeding_by_Clements_Engelhardt.jpg", "Clemens Engelhardt", CC0, ""),
        "dandelions in evening light",
    ),
}
