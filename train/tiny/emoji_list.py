"""Which emoji sana-tiny draws: (character, English name, plural).

`CLASSES` are what the transformer is trained to draw. They are well told apart at 100 px, so that a picture can be judged by a
small classifier; near-duplicates (clocks, moons, hearts of other colours) are left out. `EXTRA` are seen by the autoencoder
only: objects that a later adapter can be taught, which the autoencoder must already be able to show. The order is the class
index: append only. The names in other languages come from the package `emoji` when the data is prepared.
"""

from __future__ import annotations

_ANIMALS = """
🐶 dog | 🐱 cat | 🐭 mouse mice | 🐰 rabbit | 🦊 fox foxes | 🐻 bear | 🐼 panda | 🐨 koala | 🐯 tiger | 🦁 lion | 🐮 cow |
🐷 pig | 🐸 frog | 🐵 monkey | 🐔 chicken | 🐧 penguin | 🦆 duck | 🦉 owl | 🐴 horse | 🦄 unicorn | 🐝 bee |
🦋 butterfly butterflies | 🐌 snail | 🐞 ladybug | 🐢 turtle | 🐍 snake | 🐙 octopus octopuses | 🦀 crab |
🐠 fish fish | 🐬 dolphin | 🐳 whale | 🐊 crocodile | 🐘 elephant | 🐪 camel | 🐑 sheep sheep | 🦩 flamingo |
🦔 hedgehog | 🦜 parrot
"""
_FRUIT = """
🍎 red_apple | 🍐 pear | 🍊 tangerine | 🍋 lemon | 🍌 banana | 🍉 watermelon | 🍇 grapes grapes |
🍓 strawberry strawberries | 🍒 cherries cherries | 🍍 pineapple | 🥥 coconut | 🥝 kiwi | 🍅 tomato tomatoes |
🍆 eggplant | 🥑 avocado | 🥦 broccoli broccoli | 🥕 carrot | 🌽 corn corn | 🍄 mushroom
"""
_FOOD = """
🍞 bread loaves_of_bread | 🧀 cheese pieces_of_cheese | 🍔 hamburger | 🍟 french_fries french_fries | 🍕 pizza |
🌭 hot_dog | 🍩 doughnut | 🍪 cookie | 🎂 birthday_cake | 🍦 ice_cream ice_creams | 🍭 lollipop | 🥨 pretzel |
🥐 croissant | 🍿 popcorn popcorns
"""
_VEHICLES = """
🚗 car | 🚕 taxi | 🚌 bus buses | 🚒 fire_truck | 🚜 tractor | 🚲 bicycle | 🚀 rocket | 🚁 helicopter | ⛵ sailboat |
🚂 train | 🛸 flying_saucer
"""
_OBJECTS = """
⚽ soccer_ball | 🏀 basketball | 🎸 guitar | 🎺 trumpet | 🎻 violin | 🥁 drum | 🔑 key | 🔔 bell | 📷 camera |
💡 light_bulb | ✂️ pair_of_scissors pairs_of_scissors | ☂️ umbrella | 👑 crown | 💎 gem | 🎁 gift | 🎈 balloon |
⏰ alarm_clock | 🎩 top_hat | ⚓ anchor | 🏆 trophy trophies | 🧲 magnet | 🧸 teddy_bear
"""
_NATURE = """
🌵 cactus cactuses | 🌻 sunflower | 🌹 rose | 🌲 fir_tree | 🌴 palm_tree | ⭐ star | 🌈 rainbow | ❄️ snowflake |
🔥 fire fires | ❤️ red_heart | 🏠 house | 🏰 castle | ⛄ snowman snowmen
"""
_FACES = """
👻 ghost | 🤖 robot | 👽 alien
"""
_EXTRA = """
😀 smiling_face | 😎 face_with_sunglasses | 🎃 pumpkin | 💀 skull | 🤡 clown | 🦈 shark | 🦒 giraffe | 🦘 kangaroo |
🦖 dinosaur | 🐺 wolf wolves | 🍑 peach | 🥚 egg | 🍯 honey_pot | ☕ cup_of_coffee cups_of_coffee | ✈️ airplane |
🚢 ship | 🎹 keyboard | 📚 stack_of_books stacks_of_books | 👟 shoe | 👓 pair_of_glasses pairs_of_glasses | 🪁 kite |
🧭 compass compasses | 🌷 tulip | 🍀 clover | ☀️ sun | ⛺ tent | 🔨 hammer | 🪑 chair
"""


def _parse(*groups: str) -> tuple[tuple[str, str, str], ...]:
    rows = []
    for entry in "|".join(groups).split("|"):
        if entry.strip():
            character, name, *plural = (word.replace("_", " ") for word in entry.split())
            rows.append((character, name, plural[0] if plural else name + "s"))
    return tuple(rows)


CLASSES = _parse(_ANIMALS, _FRUIT, _FOOD, _VEHICLES, _OBJECTS, _NATURE, _FACES)
EXTRA = _parse(_EXTRA)
