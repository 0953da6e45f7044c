"""toystories.py: a built-in corpus of children's stories, with a known floor and a judge.

A probabilistic grammar tells little stories in the manner of TinyStories: as many as you like, each with the exact
log-probability of its choices. So the entropy of the corpus is known, and a model's distance to it can be measured;
and `check` says of any text whether the grammar could have told it, or which rule it breaks first.

    python toystories.py -n 3 --seed 1        # three stories on stdout, their bits on stderr
    python toystories.py --check FILE         # the verdict on each story of a file ("-" is stdin)

    for text, logprob in stories(seed=0): ... # endless; story i depends on (seed, i) alone
    check(text)                               # Verdict(ok, logprob, rule, detail)

The grammar is data: LISTS are what a story draws from, RULES are how it is told. The notation:

    name: text | text     a rule and its alternatives, equally likely; "(3) text" counts three times
    [text | text | ]      the same inside a sentence; an empty alternative takes a neighbouring space with it
    <name>                tell a rule here, or a random row of a list; <a name> puts "a" or "an" before the row
    <hero=kid>            draw a row of the list kid, tell it, and remember it as hero; <girl hero=kid> tells its
                          column `girl` instead. Two variables drawn from one list are never the same row.
    {hero} {friend.he}    a remembered row, or another column of it; {a thing} puts the article before it; {Thing} is
                          capitalised; {he} alone is {hero.he}
    <spot=place.spot>     draw from a column that holds several options (also <place.spot>, not remembered)
    ¶                     a new paragraph. Other line breaks are spaces.

A list starts with `name, kind: columns`; each line of it is one row, its columns separated by ";". A first column
of several names (separated by ",") stands for as many rows. The kind is what a wrong one is called: "wrong place".

To add a plot, write a rule that draws its hero and add its name to the rule `story`. Whatever is drawn must be
told at once, or the parser could not see it: one text must never have two derivations. That holds if the
alternatives of every choice differ in their words, in whatever way they are continued: tests/test_toystories.py
proves it for the whole grammar, proves the bounds of 60 and 250 words, and compares the entropy with the samples.
The texts of a seed change with any change here: then give VERSION a new number, and the test its new sha256.
"""
import argparse
import functools
import math
import os
import random
import re
import sys
from bisect import bisect
from collections.abc import Iterator
from itertools import accumulate, count, islice
from pathlib import Path
from typing import NamedTuple

VERSION = "1"

# ---------------------------------------------------------------------------------------------------------------
# The grammar: what stories are drawn from

LISTS = """
kid, name: girl he him his himself
    Lily, Mia, Anna, Sue, Emma, Lucy, Ella, Zoe, Amy, Sara, Rosie, Molly, Nora, Ruby ; girl ; she ; her ; her ; herself
    Kate, Jane, Grace, Alice, Nina, Clara, Hazel, Ivy, Maria, Lena ; girl ; she ; her ; her ; herself
    Tom, Ben, Tim, Max, Leo, Jack, Sam, Finn, Noah, Oscar, Toby, Jake, Henry, Peter ; boy ; he ; him ; his ; himself
    Billy, Joe, Luke, Theo, Eli, Charlie, Oliver, Adam, Paul, Hugo ; boy ; he ; him ; his ; himself
elder, name: he him his
    mom, grandma ; she ; her ; her
    dad, grandpa ; he ; him ; his
neighbor, name: he him his
    Mrs. Bell, Mrs. Hill, Miss Honey, Mrs. Gray, Miss Berry, Mrs. Wood, Miss Plum, Mrs. Lake ; she ; her ; her
    Mr. Brown, Mr. Green, Mr. White, Mr. Baker, Mr. King, Mr. Stone, Mr. Fisher, Mr. Fox ; he ; him ; his
number, number:
    seven, eight, nine, ten, eleven, twelve, fifteen, twenty, thirty, forty

toy, object:
    ball, kite, doll, drum, boat, truck, book, hat, scarf, bell, whistle, puppet, robot, train, teddy bear, backpack
    ring, umbrella, blanket, lantern, basket, bucket, flute, bracelet, mask, crown, pillow, cup, clock, toy horse
look, object:
    red, blue, green, yellow, orange, purple, pink, white, black, brown, golden, silver, striped, spotted, pretty
    bright, little, shiny, funny, lovely
place, place: at spot see
    the park ; in the park
        ; under a bench, behind the fountain, between two rose bushes, next to the duck pond, in a pile of leaves
        ; the swans on the pond, a man with six dogs, the children on roller skates, a lady who painted trees, the squirrels
    the beach ; on the beach
        ; in a tide pool, behind a sand castle, under a rowboat, between two rocks, next to a heap of seaweed
        ; the waves, the seagulls, a crab that walked sideways, the sailboats, a man with a fishing net
    the forest ; in the forest
        ; under a fern, in a hollow log, behind a mossy stone, between the roots of an oak, next to a ring of mushrooms
        ; the tall pines, a deer with its fawn, an owl asleep on a branch, the woodpeckers, a fox far away
    the lake ; by the lake
        ; under the dock, in the reeds, behind a canoe, between two water lilies, next to a heron's nest
        ; the dragonflies, a family of ducks, the silver fish, a frog on a lily pad, the rowers
    the farm ; on the farm
        ; in the hay, under a tractor, behind the barn, between two milk cans, next to the pig pen
        ; the fluffy lambs, a cow with a bell, the hens, a pony with a long tail, the piglets
    the meadow ; in the meadow
        ; in the tall grass, under a thistle, behind a haystack, between two daisies, next to a molehill
        ; the butterflies, the honey bees, a hare with long ears, the bluebells, a lark high in the air
    the playground ; on the playground
        ; under the slide, in the sandbox, behind the swings, between two tires, next to the seesaw
        ; the big kids, a baby in a stroller, the twins next door, a girl on stilts, the pigeons
    the market ; at the market
        ; under a fruit stand, in a crate of cabbages, behind the bakery, between two barrels, next to the flower cart
        ; the heaps of apples, a woman who sold honey, the cheese wheels, a man with a parrot, the baskets of eggs
    the river ; by the river
        ; under the bridge, in the mud, behind a beaver dam, between two willows, next to the ferry
        ; the little boats, an otter with a fish, the old mill, a kingfisher, the stepping stones
    the zoo ; at the zoo
        ; under a sign, in the goat pen, behind the ticket booth, between two palm trees, next to the lion cage
        ; the monkeys, a sleepy tiger, the penguins, an elephant with its calf, the tall giraffes
    the harbor ; at the harbor
        ; in a coil of rope, under a ladder, behind a crab trap, between two crates, next to the lighthouse
        ; the big ships, a sailor with a beard, the fishing boats, a pelican on a post, the tugboats
    the orchard ; in the orchard
        ; under a plum tree, in a wheelbarrow, behind a beehive, between two baskets of pears, next to the scarecrow
        ; the ripe cherries, a hedgehog, the apple pickers, a goose with a loud voice, the blackbirds

broken, object: broke mend
    kite ; its tail tore off, it ripped on a thorn, its frame snapped ; paper and glue, a strip of silk, two thin sticks
    doll ; its arm came off, its dress tore, its braid came loose ; a needle and thread, a rubber band, a bit of yarn
    teddy bear ; its ear came off, its seam split, it lost an eye ; a needle and thread, a button, some soft wool
    wagon ; its wheel fell off, its handle broke, its side cracked ; a long screw, some strong wire, a new board
    boat ; its mast snapped, its sail ripped, it sprang a leak ; wood glue, a scrap of cloth, hot wax
    drum ; its skin split, its strap snapped, its rim came loose ; a piece of leather, a strong cord, six brass tacks
    train ; its chimney broke off, a wheel came loose, its hook snapped ; a tin can, a tiny screw, a paper clip
    music box ; its lid came off, its key got stuck, its spring jumped out ; a new hinge, a drop of oil, a pair of tweezers
    umbrella ; a rib snapped, the wind tore it, its handle came off ; some strong wire, a patch of cloth, wood glue
    birdhouse ; its roof fell off, its door cracked, its floor dropped out ; four nails, a new board, wood glue
    rocking horse ; its ear broke off, a rocker cracked, its tail came out ; wood glue, a strong clamp, a bit of yarn
    lantern ; its glass cracked, its hook snapped, its handle came off ; a clean jar, some strong wire, a loop of chain

animal, animal: noise home food
    kitten ; meowed ; its cozy basket ; a saucer of milk, a bit of fish, a spoon of cream
    puppy ; whined ; its warm kennel ; a piece of sausage, a dog biscuit, a bowl of water
    bird ; chirped ; its round nest ; a few seeds, some bread crumbs, a fat worm
    duckling ; peeped ; its mother on the pond ; some oats, some peas, a few bread crumbs
    rabbit ; squeaked ; its deep burrow ; a carrot, a lettuce leaf, some clover
    squirrel ; chattered ; its nest in the oak ; three nuts, an acorn, a handful of seeds
    hedgehog ; sniffed ; its bed of leaves ; a slice of pear, a fat worm, some berries
    lamb ; bleated ; its mother in the field ; a bottle of milk, some fresh grass, some clover
    turtle ; blinked ; its quiet pond ; a lettuce leaf, some berries, a slice of melon
    fawn ; trembled ; its mother in the woods ; some fresh grass, some berries, an apple
    mouse ; scratched ; its tiny hole ; a crumb of cheese, some oats, a grain of corn
    piglet ; grunted ; its muddy pen ; an apple, a potato, some corn

beast, animal: trap can
    mouse ; was caught in a hunter's net, was tied to a post with a thick rope
        ; chewed through the knots one by one, nibbled at the rope until it snapped
    mole ; was shut in by falling rocks, was stuck in a dark cave
        ; dug a tunnel through the earth, pushed the stones aside from below
    squirrel ; sat at the bottom of a deep pit, had slid into an empty well
        ; bent a long branch down into the hole, rolled in log after log to make steps
    frog ; sank deeper and deeper into the mud, was stuck in the swamp
        ; hopped across with the end of a rope, laid down a path of lily pads and sticks
    beaver ; lay trapped under a fallen tree, had one foot jammed under a log
        ; gnawed through the wood in no time, cut the trunk into short pieces
    firefly ; was lost in the dark woods, could not see the path in the fog
        ; lit up and showed the way home, called a hundred cousins to light the path
    ant ; had a long thorn in one foot, had a sharp splinter in the nose
        ; took hold of it and pulled it out, walked right in and pushed it free
    sparrow ; had bees all over the face, was covered with itchy bugs
        ; picked them off one after another, flapped up a wind that blew them away

giant, animal:
    bear, lion, elephant, horse, moose, wolf, bull, buffalo, rhino, tiger, camel, stag

trip, place: ride see do bring
    the seaside ; by train, by bus, in an old car
        ; the long white beach, a lighthouse with a red roof, the fishing boats, dolphins far out at sea
        ; swam in the cool waves, built a castle of sand, caught tiny crabs and let them go, ate fish and chips
        ; shell, starfish, piece of green glass, smooth pebble
    the mountains ; by train, by bus, in an old car
        ; the snowy peaks, a waterfall as tall as a tower, goats on the cliffs, an eagle over the valley
        ; climbed to a high hut, drank from an icy stream, picked wild strawberries, rode in a cable car
        ; crystal, eagle feather, pine cone, walking stick
    the big city ; by train, by bus, in an old car
        ; the tall towers, a street full of lights, a clock with dancing figures, the yellow taxis
        ; rode an elevator to the very top, ate noodles with sticks, saw a museum full of bones, fed the pigeons on a square
        ; postcard, snow globe, toy taxi, balloon
    the desert ; by plane, by train, in a dusty jeep
        ; the golden dunes, a row of camels, a lizard on a hot rock, the cactus flowers
        ; slid down the dunes, rode on a camel, slept in a striped tent, drank sweet tea
        ; bag of sand, desert rose, brass lamp, woven rug
    the jungle ; by plane, by boat, in a dusty jeep
        ; the bright parrots, a monkey with a white beard, a tree with a hundred vines, the giant leaves
        ; swung on a long vine, paddled down a brown river, ate a sweet mango, crossed a bridge of ropes
        ; parrot feather, coconut, wooden mask, basket of leaves
    the island ; by boat, by plane, on a big ferry
        ; the palm trees, a volcano with a cloud on top, a turtle as big as a table, the blue bay
        ; swam with the fish, climbed a palm tree, danced around a fire, slept in a hammock
        ; shell, coconut, straw hat, string of beads
    the castle ; by bus, by train, in an old car
        ; the thick walls, a row of silver knights, a deep well, the drawbridge
        ; walked along the high walls, sat on the throne, tried on a helmet, counted the stairs of the tower
        ; wooden sword, paper crown, iron key, little flag
    the old farm ; by bus, by train, in an old car
        ; the spotted cows, a goat that ate a glove, the red barn, a hen with nine chicks
        ; milked a cow, rode on a tractor, jumped into the hay, gathered the eggs
        ; brown egg, jar of honey, goose feather, horseshoe

fear, word: why see step
    the dark ; anything could hide in it, it was so very quiet, the shadows looked like monsters
        ; the lights went out in the whole house ; lit a small candle and looked in every corner, counted to ten with open eyes
    thunder ; it was so loud, it shook the whole house, it sounded like an angry giant
        ; the sky began to rumble ; counted the seconds after each flash, beat a drum right back at the sky
    deep water ; nobody could see the bottom, fish might nibble at toes, it was so cold and green
        ; the first swimming lesson began ; put one foot in and then the other, held the edge and kicked
    the tall slide ; it went up almost to the clouds, the ladder wobbled, it was so steep
        ; all the children ran to the slide ; climbed one step and then the next, sat down and let go
    big dogs ; they had such long teeth, they barked so much, one had once knocked over a bike
        ; the neighbor's big dog came by ; held out one flat hand, stood still and spoke softly
    singing on the stage ; everybody would stare, the words might just fly away, it made knees shake
        ; the day of the school concert came ; looked at one kind face and began, took a deep breath and sang
    the dentist ; the big chair went up and down, the drill hummed like a bee, it smelled so strange
        ; a back tooth began to ache ; opened wide and squeezed a hand, thought of ice cream the whole time
    spiders ; they had too many legs, they dropped down without a sound, they ran so fast
        ; a spider sat on the bathroom door ; looked at it through a glass, gave it a name and said hello

gift, object: need
    cake ; flour and eggs, butter and sugar, plums and cream
    card ; paper and scissors, glue and glitter, crayons and ribbon
    necklace ; beads and string, shells and thread, buttons and wire
    picture frame ; twigs and glue, shells and glue, wood and nails
    pie ; apples and dough, berries and sugar, flour and butter
    scarf ; wool and two needles, yarn and a big hook, old sweaters and thread
    birdhouse ; wood and nails, a saw and glue, boards and paint
    candle ; wax and string, wax and a jar, honey wax and a cup
    pillow ; cloth and feathers, wool and thread, old shirts and buttons
    flower crown ; daisies and grass, roses and ribbon, ivy and thread

plant, object: grew
    sunflower ; as tall as the roof, taller than the fence, as bright as the sun
    pumpkin ; as big as a chair, as round as the moon, too heavy to lift
    bean plant ; as high as the window, as long as a rope, as high as the door
    rose bush ; full of buds, as wide as a bed, taller than the gate
    tomato plant ; heavy with fruit, as high as the wall, taller than its stick
    strawberry plant ; full of red berries, wider than its pot, as round as a cushion
    melon ; bigger than a ball, round and striped, almost too heavy to lift
    apple tree ; as straight as a flagpole, full of leaves, as high as a chair

contest, word: did
    sack race ; hopped up and down the stairs in a pillow case, hopped around the yard
    swimming race ; swam from one side to the other, kicked until the water foamed
    running race ; ran around the block, ran up the hill and down again
    bike race ; rode around the pond, rode to the mill and back
    rowing race ; rowed to the bridge and back, rowed until both hands hurt
    skating race ; skated around the square, skated up and down the street
    egg and spoon race ; walked up and down with a potato on a spoon, dropped egg after egg
    wheelbarrow race ; pushed a barrow full of stones, pushed the cat around the garden
prize, object:
    medal, trophy, ribbon, crown, flag, star, shield, badge, sash, wreath

plan, word: instead
    picnic ; spread a blanket on the living room floor, ate under the kitchen table
    camping trip ; built a tent of sheets, put the sleeping bags beside the stove
    garden party ; hung paper flowers on every lamp, danced with the brooms
    boat ride ; turned a big box into a boat, rowed across the rug with two brooms
    ball game ; rolled up socks for balls, set up bottles in the hall
    treasure hunt ; hid buttons all over the house, drew a map of every room
    circus show ; jumped through an old hoop, walked along a rope on the floor
    long hike ; marched through all the rooms, climbed the stairs twenty times
    train ride ; put all the chairs in a row, punched tickets with a fork
    concert ; drummed on all the pots, blew on bottles and combs

talent, word:
    whistle with two fingers, walk on both hands, draw horses, juggle three balls, do magic tricks, play the fiddle
    count in four languages, stand on one leg, yodel, bark like a dog, make paper swans, hit any target

noise, word: cause
    tap tap tap ; a branch at the window, a bird at the window
    scratch scratch ; the cat at the door, a mouse behind the wall
    drip drip drip ; the kitchen tap, a leak in the roof
    hoo hoo hoo ; an owl on the chimney, the wind in a bottle
    bump bump bump ; a shutter in the wind, an apple on the stairs
    squeak squeak ; the old garden gate, a bat under the roof
    rustle rustle ; a hedgehog in the leaves, a newspaper in the wind
    buzz buzz ; a fly in the lamp, a bee in a jar
    creak creak ; the cellar door, a rocking chair in the draft
    chomp chomp ; a rabbit in the cabbage, the dog with a bone

food, object:
    pie, cookie, cake, muffin, bun, pretzel, waffle, cheese roll, doughnut, pancake, tart, biscuit, jam roll, gingerbread man

vase, object:
    vase, teapot, bowl, lamp, mirror, plate, jug, mug, sugar pot, glass, flower pot, picture frame
"""

# ---------------------------------------------------------------------------------------------------------------
# The grammar: how stories are told

RULES = """
story: <lost> | <earn> | <quarrel> | <mend> | <animal> | <fear> | <trip> | <surprise> | <storm> | <race> | <share> |
    <grow> | <honest> | <newcomer> | <night> | <fable>

trait: cheerful | curious | clever | gentle | kind | quiet | silly | playful | lively | funny | sweet | friendly |
    busy | dreamy | thoughtful | bright | polite | merry | smart | helpful
trait2: brave | honest | patient | lucky | messy | noisy | careful | hungry | stubborn | shy | proud | quick
outdoors: climb trees | jump over puddles | chase butterflies | watch the clouds | ride a bike | skip rope | fly paper planes |
    collect stones | pick flowers | look for bugs | feed the birds | dig holes | catch frogs | follow snails | play tag |
    roll down hills | play hide and seek | run barefoot | throw sticks | build dams
indoors: draw pictures | sing songs | read stories | bake cookies | build towers | tell jokes | dance | paint |
    count the stars | make up games | do puzzles | write letters | dress up | fold paper boats | play cards | knit
loved: loved | liked
fine: sunny | bright | warm | clear | breezy | cool | lovely | quiet | golden | mild | windy | fresh | calm | hot | hazy | busy
season: spring | summer | autumn
daytime: morning | afternoon | day
weekday: Monday | Tuesday | Wednesday | Thursday | Friday | Saturday | Sunday
few: two | three | four | five | six | seven | eight | nine
oneday: One day, | (6) One <fine> <daytime>, | (4) On <weekday> [morning | afternoon | evening], | (2) One <season> <daytime>, |
    (2) After [breakfast | lunch | school | church] one day,
thenext: The next [morning | afternoon | day] | On <weekday> | Exactly <few> days later | A week later
soon: Soon | After a while | Before long | A little later | At last | In the end | By and by | Then
ran: ran | hurried | walked | raced | skipped | hopped | marched | rushed | dashed | trotted | strolled | went
cried: cried | shouted | called | yelled | exclaimed | sang out
said: (3) said | whispered | murmured | mumbled | declared
softly: softly | gently | slowly | quietly | kindly | calmly | warmly | brightly | cheerfully | with a smile | with a wink | with a nod
happy: happy | glad | proud | pleased | thankful | cheerful | merry | delighted | excited | joyful | lucky | content
sad: sad | unhappy | upset | gloomy | miserable | lonely | hopeless | sorry | lost | down
weeping: a tear ran down {his} [nose | cheek | chin] | {his} [lip | chin | voice] began to shake | {he} could hardly [speak | eat | sleep | swallow]
joy: <smiled> | was so <happy> that {he} <danced> | felt <happy> from head to toe | felt as <light> as <a feather>
smiled: smiled | grinned | laughed | clapped {his} hands | jumped up and down | giggled | beamed | did a little dance
danced: danced | sang | skipped | hummed | whistled | twirled | cheered | wanted to shout
light: light | free | merry | airy
feather: feather | bird | cloud | balloon | butterfly | soap bubble | leaf | lark
color: red | blue | green | yellow | gray | brown | white | black | purple | pink | orange | golden
clothes: hat | cap | coat | scarf | sweater | jacket | cape | shirt | vest | raincoat
cute: little | fat | tiny | sleepy | shy | noisy | curious | hungry | lazy | clever | pretty | funny | brave | busy | wet | cheeky
creature: snail | bee | robin | cat | beetle | moth | sparrow | spider | ladybug | caterpillar | grasshopper | crow |
    butterfly | lizard | blackbird | dove
old: old | tall | broken | dusty | wobbly | crooked | wooden | rusty | mossy | painted | narrow | heavy
perch: gate | wall | fence | roof | stone | bench | post | stump | bridge | barrel | ladder | signpost
mood: tall | old | young | jolly | thin | round | kind | sleepy | grumpy | busy | lonely | polite
folk: baker | mailman | nurse | painter | fisherman | soldier | fiddler | clown | gardener | sailor | policeman | shepherd |
    teacher | carpenter | cook | tailor
luggage: hat | coat | tie | umbrella | bag | bike | suitcase | beard
smell: hay | rain | bread | roses | pine | apples | mint | smoke | honey | soup | grass | cinnamon
tasty: sweet | tasty | fresh | big | tiny | warm | soft | lovely | yummy | round | golden | fine
fruit: plums | apples | pears | cookies | peaches | buns | carrots | cherries | nuts | rolls | pancakes | muffins
filling: cheese | ham | jam | honey | butter | egg | tomato | fish
drink: lemonade | milk | tea | cocoa | apple juice | water | ginger ale | berry juice
sound: a dog barked | a bell rang | a train whistled | a rooster crowed | a horn blew | a clock struck | a door slammed | somebody sang |
    an owl hooted | a cow mooed | a fiddle played | a gate creaked
furniture: table | chair | sofa | bed | shelf | stove | door | curtain | piano | rug | cupboard | window
cozy: small | little | white | cozy | crooked | yellow | tidy | noisy | old | warm | narrow | pretty
home: house | cottage | cabin | hut | farmhouse | brick house | wooden house | tower
homeland: by the sea | at the edge of town | on a green hill | near the woods | in a busy street | beside a mill |
    behind the church | under tall trees | in a quiet village | across from the school | by the railroad | over a bakery
giver: uncle | aunt | cousin | godmother | sister | brother | neighbor | teacher
toyfriend: pillow | doll | teddy bear | cat | dog | diary | goldfish | rabbit
dream: dragon | whale | castle | rocket | snowman | giant | ship | mermaid | unicorn | circus | garden | pirate
mud: bushes | mud | sand | leaves | grass | weeds | straw | stones
puddles: puddles | trash cans | shadows | holes | corners | flowers | ditches | branches
mice: mice | bats | ladders | wasps | snakes | moths | high towers | geese | elevators | frogs
milk: milk | snow | chalk | a sheet | flour | a goose | a lily | salt
sadbeast: sad lion | sad clown | gray cloud | lonely whale | broken heart | dark storm | blue fish | wet cat

meet: Once upon a time, there was <a trait> [little | young] <girl hero=kid> named {hero}. {He} <loved> to <outdoors>.
    | Once there was <a trait> <girl hero=kid> [named | called] {hero} who <loved> to <outdoors> and <indoors>.
    | In <a cozy> <home> <homeland>, there lived <a trait> <girl hero=kid> named {hero}.
    | <hero=kid> was <a trait> {girl} who lived in <a cozy> <home> <homeland>.
    | <hero=kid> <loved> to <outdoors>, and when it rained {he} <loved> to <indoors>.
    | Everybody <homeland> knew <hero=kid>. {He} was <a trait> and <trait2> {girl} who <loved> to <indoors>.
bug: <a cute> <creature> on <a old> <perch>
person: <a mood> <folk> with <a color> <luggage>
sights: <bug> and <person> | <few> <cute> <animals> and <bug> | <person> and <few> <cute> <animals>
animals: ducks | goats | ponies | geese | puppies | sheep | rabbits | donkeys | hens | kittens | cows | pigeons
treats: <few> <tasty> <fruit>
snack: <treats> and <a filling> sandwich | <treats> and a bottle of <drink> | <a filling> sandwich and a cup of <drink>
air: The air smelled of <smell>, and [far away | somewhere | nearby] <sound>. | It smelled of <smell>. | [Far away | Somewhere | Nearby], <sound>.
    | <A cute> <creature> sat on <a old> <perch>. | <A mood> <folk> walked by with <a color> <luggage>.
outfit: {He} put on {his} <color> <clothes>. | {He} put <snack> into {his} <color> bag. | {He} took {his} <color> <clothes> and <treats>.

lost: <lost_open>¶ <lost_gone> [<lost_ask> | ]¶ <lost_look> <found> {hero} <lost_joy>¶ <lost_end>
lost_open: <meet> {His} favorite thing in the whole world was <a look=look> <thing=toy>. [{He} took it everywhere, even to [bed | school | the table | the bath]. | {His} <giver> had given it to {him}. | {He} had found it behind the <furniture>.]
    | There was once <a look=look> <thing=toy> that belonged to <a trait> <girl hero=kid> named {hero}.
      [It was not big and it was not fancy, but {he} loved it more than anything. | {He} talked to it, and {he} was sure that it listened. | Each night it lay [beside | under | on] {his} pillow.]
    | <hero=kid> had many things, but {he} loved only one of them with all {his} heart. It was <a look=look> <thing=toy>, a present from {his} <giver>.
    | "Look what I have!" <cried> <hero=kid>, and {he} held up <a look=look> <thing=toy>. {His} <giver> had made it just for {him}, and {he} [would not let go of it | showed it to everybody | could not stop looking at it | felt like the luckiest {girl} in town].
lost_gone: <oneday> {hero} and {his} <elder=elder> <ran> to <place=place>. {hero} took the {thing} along.
      They saw <place.see> and <sights>. But when it was time to go home, the {thing} was gone.
    | <oneday> {hero} played with the {thing} <at place=place> while {his} <elder=elder> [read a book | drank some <drink> | talked to <person> | took a nap | ate <snack>]. <air>
      Then [a wind came up | it began to get dark | a bell rang | the sun went down | clouds came up], and in the rush {he} left the {thing} behind. {He} noticed it only [at supper | at bedtime | at the front door | in the bath].
    | <oneday> {hero} carried the {thing} to <place=place> to show it to {his} <elder=elder>. On the way {he} stopped to look at <sights>. {He} stopped again to [tie {his} shoe | smell a flower | drink some water | pick up a leaf | eat <treats>]. And when {he} got there, {his} hands were empty.
lost_ask: "Do not cry," said {his} {elder} <softly>. "[A thing that is lost wants to be found | Let us go back and look | We will look until we find it | Two pairs of eyes are better than one]."
    | "My {thing}!" <cried> {hero}. {He} felt so <sad> that <weeping>.
    | {He} asked <person>, but [nobody had seen it | that was no help at all].
lost_look: {hero} <ran> back to {place}. {He} searched in the <mud> and in the <puddles>, and {he} looked under <a color> [cart | bench | box | boat | tent | blanket].
    | They went back to {place} with a [lamp | torch | candle | dog | map | rope]. They looked [high and low | here and there | up and down | near and far]. They found <a color> <junk> and <a old> <junk2>, but that was all.
    | "Think," said {his} {elder} <softly>. "Where were you when you had it last?" {hero} closed {his} eyes. {He} remembered <bug>. Then {he} <ran> [straight | all the way | as fast as {he} could] to {place}.
junk: button | shoe | feather | glove | coin | spoon | sock | marble
junk2: bottle | wheel | bucket | pipe | kettle | comb | shovel | watch
found: And there, <place.spot>, lay the {look} {thing}!
    | Then {he} saw something {look} <place.spot>. It was {his} {thing}!
    | <A cute> <creature> sat <place.spot>, and next to it lay the {look} {thing}.
    | <soon> {he} found the {look} {thing} <place.spot>, [a bit wet | a bit dusty | covered with dew | with a snail on it] but safe.
lost_joy: hugged it [tight | for a long time | and kissed it]. | picked it up and [would not let it go | wiped it clean | danced around with it]. | <joy>.
lost_end: From that day on, {hero} tied <a color> ribbon to the {thing} [before {he} went out | so that it could not get lost | and never lost it again].
    | That night, {hero} slept with the {look} {thing} in {his} arms. {He} dreamed of <a color> <dream> and of {place}.
    | "Next time," <said> {hero}, "[I will look after you better | I will count my things before I leave | you will stay in my bag]." And {he} kept {his} word each time {he} went to {place}.
    | {hero} learned [to take good care of the things {he} loved | that it helps to stay calm and think | never to give up too soon]. And the {thing} [never got lost again | was never left behind again | always came home from {place}].

earn: <earn_open>¶ "<price> <num=number> coins," <said> {boss}. <earn_poor>¶ <earn_work> <earn_more> [<earn_tired> | ]¶ <earn_turn> <earn_end>
price: It costs | You may have it for | That will be | The price is | It is yours for
earn_open: <meet> <oneday> {he} saw <a look=look> <thing=toy> in the [window | corner | doorway] of <a cozy> shop. The shop belonged to <boss=neighbor>. [{hero} could not stop looking at it. | {hero} wanted it more than anything. | {hero} pressed {his} nose against the glass.]
    | In the shop of <boss=neighbor>, between <a color> <jar> and <a old> <lamp>, stood <a look=look> <thing=toy>. Each day after school, <a trait> <girl hero=kid> named {hero} came in to look at it.
    | "Please, how much is the <look=look> <thing=toy>?" asked <hero=kid>. {He} had seen it in the shop of <boss=neighbor>, between <a color> <jar> and <a old> <lamp>, and {he} had [dreamed of | thought of | talked about] nothing else.
jar: book | jar | hat | box | cup | pencil | globe | broom
lamp: clock | lamp | drawer | chest | trunk | mirror | violin | statue
earn_poor: {hero} [counted {his} money. {He} had only | looked into {his} piggy bank. There were only | turned out {his} pockets and found only] <few> [pennies | pennies and <a color> button | pennies and some string]. [That was not enough. But {hero} did not give up. | {hero} went home and thought hard. | "Then I will earn it," {he} <said>.]
earn_work: So {he} went to work. {He} <jobhome>, {he} <jobyard>, and {he} <jobtown>.
    | "I will work for it," {he} said. {He} <jobhome> for {his} <giver>. {He} <jobyard> for <a mood> <folk>. And {he} <jobtown>.
    | On <weekday>, {he} <jobhome>. The next day, {he} <jobyard>. On the day after that, {he} <jobtown>.
jobhome: swept the floor | washed the dishes | polished the shoes | folded the laundry | dusted the shelves | set the table | made the beds | peeled the potatoes | cleaned the windows | fed the cat
jobyard: raked the leaves | watered the garden | pulled the weeds | picked the berries | stacked the wood | painted the fence | fed the chickens | swept the path | mowed the lawn | cleaned the stable
jobtown: walked <few> dogs | carried bags at the market | sold <drink> on the corner | washed <few> cars | sold <fruit> at the gate | brought the milk | delivered newspapers | looked after the baby next door
earn_more: Each coin went into <a color> <purse>. | Coin by coin, the <color> <purse> got heavier. | It was hard work, but {he} [never gave up | <danced> | thought of the {thing}].
purse: jar | box | sock | can | purse | mug | bag | tin
earn_tired: {His} <arms> ached and {his} <feet> hurt. | Sometimes {he} wanted to buy <treats> instead, but {he} did not. | "You work like an ant," said <a mood> <folk>.
arms: arms | hands | fingers | shoulders
feet: feet | legs | knees | toes
earn_turn: <soon> {hero} had {num} coins and <ran> to the shop. [{boss} took the {thing} down and put it into {his} hands. | But the {thing} was not there! "Do not worry," said {boss} <softly>. "I hid it under the counter, so that nobody else could buy it."]
    | When {he} had {num} coins, {he} put them on the counter in a row. {boss} counted them <softly>. "[Well done | You earned it | It is yours | Good work], {hero}."
    | But the day before {he} had {num} coins, {boss} stopped {him} in the street. "I saw how hard you worked," said {boss} <softly>. "Here is the {thing}. [Keep the coins. | Bring the rest when you can. | Will you help me in the shop sometimes?]"
earn_end: {hero} carried the {look} {thing} home [like a treasure | under {his} <clothes> | with both arms | on tiptoe]. [It was worth every coin. | Nothing had ever felt so good. | A thing that you earn is sweeter than a gift.]
    | {hero} <joy>. No {thing} in the world was as fine as the {look} {thing} that {he} had earned.
    | That evening, the {look} {thing} [stood next to the <furniture> | lay on {his} bed | sat in {his} lap], and {hero} could not stop smiling. {He} had [worked for it all by {himself} | waited for it so long | paid for it with {his} own hands].

quarrel: <q_open>¶ <q_pull> <q_apart>¶ <q_sorry> <q_end>
q_open: <hero=kid> and <friend=kid> were best friends. They [lived next door to each other | sat side by side at school | walked to school together | shared a tree house] and <loved> to <outdoors>. <q_start>
    | "It is mine!" <cried> <hero=kid>. "No, it is mine!" <cried> <friend=kid>. They had been best friends for <few> years. But then they had found <a look=look> <thing=toy> <at place=place>, [and now the whole street could hear them | and now nobody could stop them | and even <bug> could hear them now].
    | <meet> {His} best friend was <friend=kid>, who <loved> to <indoors>. <q_start>
q_start: <oneday> they found <a look=look> <thing=toy> <at place=place>. [Nobody knew whose it was, and both of them wanted to keep it. | "I saw it first," <cried> {hero}. "But I touched it first," <cried> {friend}.]
    | <oneday> they sat <at place=place> with <a look=look> <thing=toy>. <air> {hero} wanted to have the {thing} all day. [So did {friend}. | {friend} wanted a turn. | {friend} said it was not fair.]
q_pull: {hero} pulled on one side, and {friend} pulled on the other. <rip>! The {thing} [fell into the <mud> | slipped out of their hands | flew through the air and landed in the <puddles>].
    | {friend} grabbed the {thing} and ran. {hero} ran after {friend.him}, past <person>, until they fell down in the <mud>.
    | "You are <mean>!" <cried> {hero}. "And you are <selfish>!" <cried> {friend}. {hero} stamped {his} foot, and {friend} turned [red | pale | away | purple].
rip: Rip | Crack | Plop | Bang | Snap | Crash
mean: mean | rude | greedy | bossy | silly
selfish: selfish | nasty | unfair | stubborn | a bully
q_apart: Then they went home, each one alone. {hero} ate <treats> without a word. It was so <dull> and <dull2> without {friend}.
    | For <few> days, they did not speak. {hero} [played alone | sat by the <furniture> | kicked stones down the road | drew <a sadbeast>] and missed {friend}.
    | {hero} [stuck out {his} tongue | crossed {his} arms | turned {his} back], and {friend} went away. The {look} {thing} lay in the <mud>, and nobody wanted it anymore.
dull: quiet | boring | dull | empty | gray | cold
dull2: lonely | slow | strange | sad | sleepy | dark
sorry: "I am sorry," <said> {hero}. "[You are more important than any {thing} | I was <mean> | A friend is better than a {thing} | I miss you]." "I am sorry, too," <said> {friend}.
    | Then both of them said "I am sorry" at the very same time, and they <friends>.
    | {hero} held out <treats>. "I am sorry," {he} <said>. {friend} [ate one | took them | nodded | smiled]. "Me too."
friends: had to laugh | hugged | shook hands | began to giggle | felt much better | both turned red
q_sorry: <thenext>, {hero} went to find {friend}. {friend} was already [at the gate | on the way | on the steps | at the corner]. <sorry>
    | <thenext>, it began to rain, and both of them <ran> under the same [roof | tree | bridge | umbrella]. They looked at each other. <sorry>
    | <thenext>, {hero} <ran> back to {place}. {friend} was there, all alone. <sorry>
q_end: From then on, they [took turns with | shared | both looked after] the {look} {thing}. {hero} had it [in the morning | on Mondays | on sunny days], and {friend} had it [in the afternoon | on Tuesdays | on rainy days]. [It is more fun to share than to win. | Sharing made it twice as nice. | ]
    | They gave the {look} {thing} to <a cute> child {place.at}, and they went off to <outdoors>. [A friend is worth more than a toy. | Nothing could come between them now. | ]
    | They [made up a game for two | thought of a plan | laughed about it], and the {look} {thing} belonged to both of them. {hero} and {friend} never fought about it again.

mend: <mend_open>¶ <mend_try>¶ <mended> <mend_end>
mend_open: <meet> {He} had <a look=look> <thing=broken> that {his} <elder=elder> had [made | bought | painted | built] [for {his} birthday | long ago | on a trip]. <mend_oops>
    | There once stood <a look=look> <thing=broken> next to <a color> <furniture> in the <home> of <a trait> <girl hero=kid> named {hero}. {His} <elder=elder> had [made | bought | painted | built] it for {him}. <mend_oops>
    | <rip>! <hero=kid> looked down and held {his} breath. On the floor lay {his} <look=look> <thing=broken>, the one that {his} <elder=elder> had given {him}. [The cat had jumped on it | {hero} had leaned on it too hard | It had fallen off the <furniture>], and <thing.broke>.
mend_oops: <oneday> [{hero} was careless | {he} ran too fast | {he} tripped over <a color> <clothes> | {he} bumped into the <furniture>], and <thing.broke>. "Oh no!" <cried> {hero}.
mend_try: "It is [broken | ruined | done for]," <said> {hero}, and {he} felt so <sad> that <weeping>. "Nothing is too broken for [two pairs of hands | a good idea | a little patience]," said {his} {elder} <softly>. "All we need is <fix=thing.mend>."
    | First, {hero} tried to mend it with <gum>. That only made a mess. Then {he} tried it with <a color> <lace>, but it did not hold. "Why not try <fix=thing.mend>?" asked {his} {elder} <softly>.
    | {hero} wanted to throw it away. But {his} {elder} [looked at it closely | put on a pair of glasses | put down a cup of <drink>]. "Wait," said {his} {elder} <softly>. "I think that <fix=thing.mend> will do it."
gum: mud | gum | honey | jam | soap | butter | tape | jelly | dough | syrup
lace: shoelace | hair clip | leaf | straw | sock | candy wrapper | rubber band | sticker
mended: They worked [all afternoon | until supper | by the light of a lamp | side by side], and with {fix} they made the {thing} whole again.
    | {hero} found {fix} in [a kitchen drawer | the attic | <a old> box | the shed | <a color> tin | the cellar], and {he} fixed the {thing} [<softly> | with {his} tongue between {his} teeth | all by {himself}].
    | It took <few> tries and [a whole hour | steady hands | much patience | a lot of <drink>], but thanks to {fix} the {thing} was as good as new.
mend_end: "Now it has a story," said {his} {elder} <softly>. {hero} [ran a finger over the crack | nodded | smiled], and {he} loved the {look} {thing} even more than before.
    | {hero} <joy>. After that, whenever something broke, {he} did not cry. {He} remembered the {look} {thing} and [went to find {his} {elder} | looked for the tools | rolled up {his} sleeves].
    | The {look} {thing} was not perfect, but [that did not matter | it was stronger than before | it was loved]. {hero} learned that [broken things can be mended | it is better to fix a thing than to throw it away | patience can mend almost anything].

animal: <a_open> <a_what>¶ <a_help> <a_wait>¶ <a_home> <a_end>
a_open: <meet> <oneday> {he} was on the way to <place=place> when {he} heard a sound. Something <noise pet=animal> behind <a old> <hedge>.
    | Something <noise pet=animal> in the <mud>. <hero=kid> stopped to listen. {He} was on the way to <place=place> with <snack>, but [that could wait | now {he} forgot all about it | this was more important].
    | It was [cold | cool | windy | damp | late] <at place=place>, and almost everybody had gone home. Only <hero=kid> was still there, in {his} <color> <clothes>. Then something <noise pet=animal> behind <a old> <hedge>.
hedge: shed | hedge | barrel | wall | fence | tree | door | cart
a_what: It was a <baby> {pet}, [and it was lost | and one leg was hurt | and it was shaking with cold | and it was all alone].
    | {He} bent down and saw a <baby> {pet} that was [stuck in a fence | stuck in a hole | caught in some string | too weak to walk].
baby: small | tiny | baby | wet | young | thin | scared | shy
a_help: "Do not be afraid," <said> {hero}. {He} wrapped the {pet} in {his} <color> <clothes> and gave it <pet.food>.
    | {hero} moved [softly | gently | slowly | quietly | carefully | without a sound], so that the {pet} would not be scared. {He} offered it <pet.food>. First it [sniffed | looked away | backed off | hid its face], but then it began to eat.
    | "You poor <baby> thing," <said> {hero}. {He} <ran> home and came back with <pet.food> and <a color> [blanket | towel | pillow | sock].
a_wait: The {pet} [looked up at {him} | closed its eyes | stopped shaking | put its head in {his} hand]. {He} named it <petname>. | For <few> days, {hero} took care of it, and each day it grew [stronger | braver | rounder | livelier]. {He} named it <petname>. | {His} <giver> brought <a color> [box | basket | bucket | crate] full of <straw>, and soon the {pet} [felt better | was dry and warm | could stand up again].
straw: hay | straw | leaves | moss | wool | feathers | rags | paper
petname: Button | Pepper | Biscuit | Pickle | Muffin | Sunny | Cloud | Lucky | Star | Pip | Ginger | Bean
a_home: Then {hero} took the {pet} back to {pet.home}. [It turned around once, as if to say thank you. | It was hard to say goodbye. | "Goodbye, little one," {he} <said>.]
    | But {he} knew that a {pet} needs its own home. So {he} carried it back to {pet.home}, [waved | smiled | sniffed a little | kissed its head], and let it go.
a_end: After that, each time {hero} came to {place}, the {pet} [came out to greet {him} | waited for {him} | sat nearby and watched {him} <outdoors>].
    | And when {hero} went to {place} the next [week | spring | summer | month], there was the {pet}, [fat and happy | twice as big | with <few> little ones].
    | {hero} <ran> home from {place} with a warm heart. [Even a small hand can help a lot. | It feels good to help someone smaller. | It takes only a little to be kind.] And somewhere, a {pet} {pet.noise} [happily | for joy | in its sleep].

fear: <fear_open>¶ <fear_day> <fear_told>¶ <fear_step> <fear_end>
fear_open: <meet> {He} was not afraid of <lions> or <ghosts>. But {he} was afraid of <fear=fear>, because <fear.why>.
    | "I am not afraid of <lions> or <ghosts>," said <hero=kid> to {his} <toyfriend>. That was true. But {he} was afraid of <fear=fear>, because <fear.why>. [Nobody knew it but {his} <giver>. | {He} had never told anybody.]
    | There was one thing that <hero=kid> did not like, and that was <fear=fear>. "I know that it is silly," {he} told {his} <color> <toyfriend>. But {he} could not help it, because <fear.why>.
lions: lions | bulls | storms | pirates | wolves | snakes | mice | bees
ghosts: ghosts | witches | dragons | bears | goblins | giants | monsters | crocodiles
fear_day: <oneday> {fear.see}. {hero} wanted to <hide>. {His} <heart> [knocked like a drum | shook like a leaf | would not keep still].
    | <oneday> {fear.see}. {hero} turned as white as <milk> and wanted to <hide>.
hide: hide under the <furniture> | hide behind the <furniture> | run away | crawl into a hole | fly to the moon | be a mouse | become invisible | sleep for <few> days
heart: heart | knees | teeth | hands | lips | legs
fear_told: "I was afraid of {fear} too, when I was little," said {his} <elder=elder> <softly>. "[Being brave does not mean that you are not scared. | You do not have to like it. | A fear gets smaller when you look at it.] [Just take one small step. | Let us do it together. | Try it just once.]"
    | {His} <elder=elder> sat down beside {him} with <treats>. "Everybody is afraid of something," said {his} {elder} <softly>. "I am afraid of <mice>. [But I do not let that stop me. | Shall we be brave together? | But I hum a song, and then it is not so bad.]"
fear_step: So {hero} took a deep breath. {He} <fear.step>. {He} waited. [Nothing bad happened. | It was not so bad after all. | {His} <heart> grew calm.]
    | {hero} thought of <a color> <dream> and counted to <few>. Then {he} <fear.step>. {His} {elder} [cheered | clapped | nodded | smiled at {him}].
    | "I can do it," <said> {hero}. {He} <fear.step>. The next time it was [easier | almost easy | better | nearly fun].
fear_end: After that, {hero} was no longer afraid of {fear}. {He} <joy>, and {he} told {his} {elder} about it [<few> times | all evening | over <treats>].
    | {Fear} did not seem so terrible now. "I was scared, but I did it anyway," <said> {hero}, and {he} ate <treats> with {his} {elder}.
    | From then on, when somebody was afraid of {fear}, {hero} [took their hand | sat with them | told them how it went]. "[One small step | A deep breath | A friend beside you], that is all you need," {he} said, just like {his} {elder}.

trip: <t_open> <t_pack>¶ <t_there> [<t_night> | ]¶ <t_find> <t_home>
t_open: "Pack your bag, <hero=kid>!" <cried> {his} <elder=elder>. "<weekday> is the big day. We are going to <trip=trip>!" {hero} <smiled>.
    | <meet> {He} had never been to <trip=trip>, but {he} had [read <few> books | asked <few> questions | dreamed <few> times] about it. <oneday> {his} <elder=elder> came in with <few> tickets.
    | For <few> nights, <hero=kid> had been too excited to sleep. {His} <elder=elder> wanted to take {him} to <trip=trip>!
t_pack: {He} packed <treats>, <a color> <clothes>, and <a old> [map | camera | compass | notebook]. They traveled <trip.ride> for <few> hours, and {he} counted [cows | trees | bridges | clouds | birds | towers] on the way.
    | {hero} took {his} <color> <clothes> and <snack>. They traveled <trip.ride>, next to <person> who told <few> jokes.
t_there: What a place it was! {hero} saw <trip.see> and <sights>. Then they <trip.do>. {He} <joy>.
    | "Is it real?" asked {hero}. In front of them lay <trip.see>. It smelled of <smell>, and nearby <sound>. Before lunch, they ate <treats>. After lunch, they <trip.do>.
    | They met <person> who showed them <trip.see>. "[You will never see anything like this at home | Not many people know this place | Come with me]!" Then they <trip.do>.
t_night: In the evening, {hero} missed {his} <color> <toyfriend>. "[Home is only a few hours away | Look, it is the same moon as at home | Tell it all about today in your dreams]," said {his} {elder} <softly>.
    | That night, {hero} [lay awake | looked up at the moon | listened to the wind]. {He} did not want to forget anything, so {he} drew <sights> in a little book.
t_find: On the last day, {hero} found <a thing=trip.bring>. [{He} put it into {his} pocket. | "This comes home with me," {he} <said>. | It was just the right size for {his} hand.]
    | Before they left, {his} {elder} bought {him} <a thing=trip.bring> from <a mood> <folk>.
t_home: At home, the {thing} [stood on | lay on | got a place next to] the <furniture>. Whenever {hero} looked at it, {he} thought of {trip} and [<smiled> | made plans for the next trip | told the story again].
    | {hero} showed the {thing} to {his} <giver> and talked about {trip} for <few> hours. [The world is big, and there is so much to see. | It is good to go away, and it is good to come home.]
    | That night, {hero} put the {thing} under {his} pillow. {He} was glad to be home, and in {his} dreams {he} went back to {trip}.

surprise: <s_open>¶ <s_work> <s_oops>¶ <s_day> <s_end>
s_open: "Shh!" whispered <hero=kid> to {his} <color> <toyfriend>. "<weekday> is <Elder=elder>'s birthday. I want to make <a look=look> <thing=gift>, but it must be a secret."
    | <meet> {His} <elder=elder> had a birthday on <weekday>. "I will make <a look=look> <thing=gift>," {he} thought, "and nobody must know."
    | <oneday> <hero=kid> counted the days and got a shock. {His} <elder=elder> had a birthday in <few> days! {He} had no money for a present. "But I have two hands," {he} <said>. "I can make <a look=look> <thing=gift>."
s_work: {hero} got <thing.need> from {his} <giver> and hid [in the attic | in the shed | in the cellar | behind the <furniture> | under the <furniture>]. {He} worked for <few> [hours | evenings].
    | {He} looked for <thing.need> in <a old> <chest>, in <a color> bag, and behind the <furniture>. Then {he} locked the door and began.
    | First, {he} needed <thing.need>. <A mood> <folk> gave {him} some in return for <treats>. Then {he} sat down and worked [all day | all night | until {his} <arms> hurt].
chest: chest | drawer | trunk | basket | box | crate
s_oops: The first {thing} looked like <a sadbeast>. {He} felt <sad>, but {he} began again, and the second one was [much better | just right | really pretty].
    | Just then, the door opened. "What are you doing there?" asked {his} {elder}. {hero} [sat down on the {thing} | hid the {thing} behind {his} back | put {his} <clothes> over the {thing}]. "Nothing," {he} <said>, and {he} turned [red | pink | pale].
    | {His} {elder} called {him} to supper <few> times. "In a minute," {hero} called back, and {he} worked a little faster. There was <fluff> on {his} nose and <fluff2> in {his} hair.
fluff: paint | flour | glue | dust | ink | soot
fluff2: thread | wool | paper | straw | sugar | soap
s_day: When the day came, {hero} brought the {thing} on <a color> [tray | pillow | plate | cloth]. "Happy birthday, {Elder}!" {he} <cried>. {His} {elder} <gasped>.
    | On the birthday, {hero} put the {thing} next to the <furniture> and hid. {His} {elder} came in and stopped. "[Who | What good fairy | What busy elf] has made me such a {look} {thing}?" {hero} jumped out and <smiled>.
    | Early in the morning, {hero} <ran> into the bedroom with the {thing}. "It is for you, {Elder}. I made it [all by myself | in secret | with my own hands]," {he} <said>. {His} {elder} <gasped>.
gasped: laughed out loud | clapped and clapped | looked at it for a long time | could not speak | sat down with surprise | hugged {him} tight
s_end: "It is the best present I ever got," said {his} {elder} <softly>. [And they ate <treats> together. | And {hero} <joy>. | And nobody was as <happy> as {hero}.]
    | {His} {elder} talked about the {look} {thing} for many years. [A gift that you make yourself is worth more than gold. | A gift made with love is the finest of all.]
    | They sat down with <snack>, and {his} {elder} looked at the {look} {thing} again and again. {hero} learned that [giving is even nicer than getting | the best presents cannot be bought | love is in the little things].

storm: <w_open>¶ <w_rain> <w_sad>¶ <w_idea> <w_end>
w_open: <meet> {His} <elder=elder> had promised {him} <a plan=plan> <at place=place> on <weekday>. <outfit>
    | "Is it <weekday> yet?" asked <hero=kid>. {His} <elder=elder> laughed. They had planned <a plan=plan> <at place=place>, and {hero} could hardly wait. <outfit>
    | For <few> days, <hero=kid> had looked forward to <a plan=plan> <at place=place>. {He} wanted to go there with {his} <elder=elder>. <outfit>
w_rain: But on the morning of the {plan}, {he} woke up and heard <a rumble>. [Rain ran down the window | Hail jumped on the roof | The wind shook the trees | Lightning lit up the sky], and the sky was as gray as <a mouse>.
    | They were already at the door when <a rumble> came from above. <plink>! One drop fell on {his} nose. <plink2>! Another one fell on {his} <arms>. Then it poured.
rumble: rumble | roar | crash | growl | howl | hiss
mouse: mouse | stone | donkey | wolf | whale | wet sock
plink: Plink | Plop | Splash | Splat | Pling | Drip
plink2: Plonk | Splosh | Pitter | Patter | Drop | Spat
w_sad: "Our {plan} is ruined!" <cried> {hero}. {He} felt so <sad> that <weeping>.
    | {hero} stamped {his} foot. "Go away, rain!" {he} <cried>. But the rain did not listen, and {he} sat down beside the <furniture>.
    | {hero} pressed {his} nose against the glass. Outside there was only <bug>. "No {plan} today," {he} <said>.
w_idea: "Who says so?" asked {his} {elder} <softly>. "We will have the {plan} right here." They <plan.instead>. They had <snack>, and the <furniture> was {place}.
    | {His} {elder} looked at the <furniture> and had an idea. "If we cannot go to {place}, then {place} must come to us!" So they moved the <furniture2> and <plan.instead>.
    | Then {hero} looked at {his} <toyfriend> and had an idea. "Let us do it here!" {he} <cried>. They called the kitchen {place}, and they <plan.instead>. {His} {elder} brought <treats>.
furniture2: table | chairs | sofa | lamps | boxes | carpet
w_end: When the sun came out at last, they did not even notice. It was the [best | funniest | finest | wildest] {plan} of {his} life. {hero} <joy>.
    | <soon> there was a rainbow over {place}. "We can go now," said {his} {elder} <softly>. "[Can we finish our {plan} first | Must we | Only if it rains there, too]?" asked {hero}.
    | {hero} learned that [rain cannot spoil a good mood | a good idea is better than good weather | you can have fun anywhere]. And on the next rainy day, {he} asked {his} {elder} for <a plan2> {plan} again.
plan2: big | little | long | wild | real | secret

race: <r_open>¶ <r_train> <r_start>¶ <r_turn> <r_end>
r_open: Every <season>, there was <a contest=contest> <at place=place>. The prize was <a look=look> <thing=prize>, and <hero=kid> wanted to win it. So did <friend=kid>, [the fastest | the strongest | the proudest] child in town.
    | <meet> {He} dreamed of <a look=look> <thing=prize>. It was the prize of the <contest=contest> <at place=place>. But <friend=kid> had won it <few> times already.
    | "I will win the <contest=contest>," said <hero=kid> to {his} <toyfriend>. {He} had seen the prize <at place=place>. It was <a look=look> <thing=prize>. "No, I will win it," <cried> <friend=kid> over the fence.
r_train: Each [morning | evening | afternoon], {hero} <contest.did>. {He} ate <treats> a day and went to bed at [six | seven | eight]. {friend} only laughed and lay in the <mud>.
    | For <few> days, {hero} <contest.did>. {His} <arms> ached, and {he} had <few> blisters. <A mood> <folk> cheered {him} on.
    | {His} <giver> helped {him}. Each day, {he} <contest.did>, and each day, {he} was a little [faster | better | stronger]. {friend} trained just as hard.
r_start: On <weekday>, everybody came to {place}. There were <person> and <few> <cute> <animals>. "Ready, set, go!"
    | Then it was <weekday>. {Place} smelled of <smell>, and there were flags on <few> <poles>. {hero} put on {his} <color> <clothes>. "Ready, set, go!"
    | On the big day, {hero} stood next to {friend}. {He} felt as <light> as <a feather>. "[Good luck | May the best one win | See you at the end]," <said> {friend}. "Ready, set, go!"
poles: poles | posts | tents | wagons | ladders | trees
r_turn: {friend} was fast, but then {friend.he} stopped to [wave to <person> | eat <treats> | look at <bug>]. {hero} kept going, bit by bit, and came in first. [Slow and steady wins. | Hard work is faster than luck. | ] So the {look} {thing} went to {hero}.
    | {hero} was in front. Then {he} heard a cry. {friend} had fallen behind! {friend} held {friend.his} <knee>. {hero} turned around and helped {friend.him}, and they came in last, side by side. But the judge gave the {look} {thing} to {hero}. "[This is for a good heart | A friend is worth more than a race]."
    | {hero} gave all {he} had, but {friend} was faster. So the {look} {thing} went to {friend}. {hero} felt <sad>. Then {he} shook {friend.his} hand. "[You were great | Well done | That was a good race]," {he} said.
knee: knee | foot | ankle | arm | elbow | toe
r_end: After the {contest}, {hero} and {friend} sat down {place.at} and shared <snack>. They <outdoing> until it was dark.
    | "[Let us train together | You are really good | Show me how you do it]," said {friend}. And from then on, {hero} and {friend} met every <weekday> {place.at}.
    | That night, {hero} dreamed of the {contest}. {He} had learned that [it is fine to win, but finer to have a friend | to do your best is better than to be the best | a good race needs good friends].
outdoing: <danced> | talked | laughed | played | told jokes

share: <h_open>¶ <h_meet> <h_doubt>¶ <h_give> <h_end>
h_open: <meet> <oneday> {he} got <a tasty> <treat=food> from {his} <giver>. {He} <ran> to <place=place> to eat it all alone.
    | There was only one <treat=food> left in the shop of <boss=neighbor>, and <hero=kid> had bought it. {He} <ran> with it to <place=place>. It was still warm, and it smelled of <smell>.
    | "This is the finest <treat=food> in the world," <said> <hero=kid>, "and it is all for me." {He} sat down with it <at place=place>. <air>
h_meet: But there sat <friend=kid>, who looked <sad>. "[I forgot my lunch | A dog ate my lunch | My lunch fell into the <mud> | I gave my lunch to <a cute> cat]," {friend.he} <said>.
    | Then <friend=kid> came by in <a color> <clothes>. "[I have not eaten since <yesterday> | I am so hungry | My stomach growls like <a beast2>]," <said> {friend}.
    | Not far away, <friend=kid> was looking for berries. There were none. There was only <bug>. "[No lunch today | My bag is empty | I am so hungry]," <said> {friend}.
yesterday: yesterday | breakfast | last night | six o'clock
beast2: bear | lion | tiger | wolf | dragon | motor
h_doubt: {hero} looked at the {treat}. It was [not very big | so round and so brown | just enough for one]. {He} thought of <treats>, but {he} had nothing else.
    | {hero} [hid the {treat} behind {his} back | held the {treat} a little tighter | looked the other way]. But then {he} could not enjoy it.
    | {hero} thought hard. A whole {treat} is nice. [But it is not nice to eat while somebody watches. | But who can eat when a friend is hungry?]
h_give: So {he} broke the {treat} in two. "[Half of it is for you | Eat with me | Here, take the bigger half]," {he} said to {friend} <softly>. They sat side by side and watched <place.see>.
    | "One for you and one for me," <said> {hero}, and {he} broke the {treat} in two. {friend} took a bite and <friendly>. Even <bug> got a crumb.
    | "Come here," <said> {hero}. They shared the {treat} down to the last crumb, and {friend} told {him} about <sights>.
friendly: smiled | grinned | laughed | nodded | beamed | closed both eyes
h_end: <thenext>, it was {hero} who had nothing to eat. But {friend} came to {place} with <snack>. "[Today it is my turn | I did not forget | Half of it is for you]," <said> {friend}.
    | Half of a {treat} is less than a whole one. But {hero} <joy>, because half of a {treat} with {friend} [tastes twice as good | is better than a whole one alone].
    | After that, {hero} and {friend} met {place.at} every <weekday>. Each time they brought <treats>, and each time they shared. [What you give comes back to you. | Food tastes best with a friend. | ]

grow: <g_open>¶ <g_sow> <g_wait>¶ <g_sprout> <g_end>
g_open: <meet> On {his} birthday, {he} got <a color> bag from {his} <elder=elder>. There was only one [tiny | round | brown | flat] seed in it. "[A surprise sleeps in there | Be good to it | Just you wait]," said {his} {elder} <softly>.
    | "What is that?" asked <hero=kid>. {His} <elder=elder> held up a [tiny | round | brown | flat] seed. "If you are patient," said {his} {elder} <softly>, "it will make you <happy>."
    | On the windowsill of <hero=kid> stood <a color> pot, and in the pot there was nothing but earth. {His} <elder=elder> had given {him} one [tiny | round | brown | flat] seed for it.
g_sow: {hero} put the seed into the earth next to <a old> <perch>. {He} gave it water from <a color> <can>. Then {he} sat down with <treats> and waited.
    | {hero} made a hole with {his} <finger> and laid the seed into it. {He} sang it a song about <a color> <dream>. {He} watered it <softly>.
can: can | cup | bottle | jug | mug | teapot
finger: finger | thumb | spoon | pencil
g_wait: On <weekday>, there was nothing to see. <few> days later, there was still nothing to see but <bug>. "It does not like me," <said> {hero}. "Seeds have their own clock," said {his} {elder} <softly>.
    | {hero} wanted to dig it up and look. "[Do not wake it | Good things take time | Give it one more week]," said {his} {elder} <softly>. So {hero} <passed> instead.
    | {He} waited for <few> days. {He} waited for <few> weeks. [It rained, and the sun shone. | The wind blew, and the sun shone.] {He} felt <sad>, but {he} did not give up.
passed: counted the clouds | read <few> books | painted the fence | learned a song | swept the path | knitted a sock | built a tower | fed the birds
g_sprout: Then, on <a fine> <daytime>, there was something green! "<oh>!" <cried> {hero}. It grew and grew, and by the end of <season> it was <a plant=plant>, <plant.grew>.
    | <thenext>, {hero} saw a small green tip. {He} <joy>. It got <few> leaves, and then <few> more. It was <a plant=plant>, and in the end it was <plant.grew>.
    | And then the earth broke open. "<oh>!" <cried> {hero}. "I have <a plant=plant>!" Week after week it grew, until it was <plant.grew>.
oh: Oh | Look | Hooray | At last | There it is | It is alive
g_end: {hero} showed the {plant} to everybody, to <person> and to <person2>. "[I only had to wait | It just needed time | Patience made it grow]," {he} told {his} {elder}.
    | When somebody said, "I cannot wait," {hero} told them about the {plant}. [All big things begin small. | The best things grow slowly.] And {his} {elder} [nodded | smiled | winked].
    | That evening, {hero} sat next to the {plant} with {his} {elder} and ate <treats>. "Next year I will plant <few> of them," {he} <said>.
person2: the <mood> doctor | the <mood> neighbors | the <mood> twins | the whole school

honest: <c_open>¶ <c_hide> <c_worry>¶ <c_tell> <c_end>
c_open: <meet> {His} <elder=elder> had <a look=look> <thing=vase> from <far>, and nobody was allowed to touch it. But <oneday2> {hero} was <playing> in the house, and <rip2>! It lay on the floor in <few> pieces.
    | <rip>! On the floor lay <few> pieces of <a look=look> <thing=vase>, and next to them stood <hero=kid>. {He} had been <playing> in the house. The {thing} belonged to {his} <elder=elder>, who had brought it from <far>.
    | <hero=kid> knew that {he} must not <play> in the house. {His} <elder=elder> had said so <few> times. But {he} did it anyway, and <rip2>! There went the <look=look> <thing=vase> from <far>. It broke into <few> pieces.
oneday2: on <weekday> | on <a fine> <daytime> | after lunch
playing: playing ball | skipping rope | riding a bike | throwing apples | dancing | chasing the cat | juggling | jumping around
rip2: crash | bang | crack
far: a far country | across the sea | the old days | the king's palace | a long trip | a famous shop
play: play ball | ride a bike | skip rope | throw apples
c_hide: {hero} swept up the pieces and hid them [behind | under] the <furniture>. When {his} {elder} asked about the {thing}, {he} said, "It must have been <blame>."
    | "Nobody saw it," {he} thought, and {he} put the pieces into <a old> <chest>. At supper, there were <treats>, but {he} could not eat. "Are you ill?" asked {his} {elder}. "No," {he} <said>.
    | Quickly {he} threw the pieces into the <puddles2> and <ran> away. "Who broke my {thing}?" called {his} {elder}. "I think it was <blame>," {he} <said>.
blame: the cat | the dog | the wind | <a cute> <mouse2> | <a mood> <folk>
mouse2: mouse | goat | monkey | crow | parrot | puppy
puddles2: bushes | weeds | pond | well | trash | ditch
c_worry: But that night, {he} could not sleep. {His} <heart2> felt as heavy as <stone>.
    | But the lie sat in {his} <heart2> like <stone>. Even <a creature> on <a old> <perch> seemed to look at {him} and know.
    | After that, nothing was fun. {He} wanted to <indoors>, but {he} could only think of the {look} {thing}.
heart2: heart | stomach | head | chest
stone: a stone | a brick | lead | a wet coat | an anchor | a cannon ball
c_tell: <thenext>, {hero} went to {his} {elder}. "I broke the {look} {thing}," {he} <said>. "[I am so sorry | It was not <blame2> | I was afraid to tell you]." {His} {elder} <listened>.
    | In the end, {he} could not stand it anymore. "It was me," {he} <said>. "I broke your {look} {thing}, [and I lied | and I am sorry | and then I hid it]." {His} {elder} <listened>.
blame2: the cat | the dog | the wind
listened: was silent for a while | nodded <softly> | put down a cup of <drink> | took {him} in both arms | looked at {him} for a long time
c_end: "[Thank you for telling me | That was brave | I am glad that you told the truth]," said {his} {elder} <softly>. "A {thing} can be broken, but I want to trust you." Then they glued the {look} {thing} together, piece by piece.
    | "I was sad about the {thing}," said {his} {elder} <softly>, "but a lie makes me sadder." To make up for it, {hero} <jobhome> and <jobyard>. And {he} <joy>, because the truth was out.
    | "I knew it all along," said {his} {elder} <softly>. "I was waiting for you." They ate <treats>, and {hero} felt as <light> as <a feather>. [The truth is easier to carry than a lie. | It takes courage to tell the truth.]

newcomer: <n_open>¶ <n_alone> <n_ask>¶ <n_can> <n_end>
n_open: <oneday> there was a new child at school. "This is <friend=kid>," said the teacher. "{Friend.he} comes from <far2> and does not know anybody yet." <hero=kid> turned around to look.
    | <hero=kid> looked out of the window. <A color> truck had stopped across the street. Out came <few> boxes, <a color> <furniture>, and a <mood2> <girl friend=kid> named {friend}, who had come from <far2>.
    | <meet> <oneday> somebody new came to {his} street. It was a <mood2> <girl friend=kid> named {friend}, who had just come from <far2>.
far2: the mountains | the city | an island | a far country | a ship | the desert | the north | the south
mood2: small | quiet | shy | pale | thin | serious | lonely | tall
n_alone: {friend} sat all alone on <a old> <seat> and <ate> <treats>. The other children <stared>.
    | Nobody talked to {friend}. {Friend.he} looked at <bug> and <ate> <treats>. [The others had their own games. | The others only whispered.]
    | {friend} did not say a word all day. {Friend.he} wore <a color> <clothes>, and somebody laughed at it. {Friend.he} <ate> <treats> without a smile.
seat: wall | bench | post | stump | barrel | swing
ate: ate | counted | nibbled
stared: stared | whispered | ran past | looked away | played without {friend.him}
n_ask: {hero} thought, "[How lonely that must be | I was new once, too | It is hard to know nobody]." So {he} went over and <said>, "Hello, I am {hero}. Do you want to <outdoors>?"
    | {hero} was a bit shy, too. But {he} took {his} <tasty> <apple> and held it out. "[Half of it is for you | Are you hungry | Do you like it]?" {he} asked. "And then, shall we <outdoors>?"
    | <thenext>, {hero} sat down next to {friend.him} <softly>. "Shall we <outdoors>?" {he} asked. "[I know a good place | It is more fun with two | I will show you how]."
apple: apple | pear | bun | muffin | cookie | roll
n_can: {friend} [nodded | looked up | turned red] and <said>, "I can <talent=talent>." And so {friend.he} could! {hero} had never seen anything like it. "<oh2>!" {he} <cried>.
    | At first {friend} was too shy. But {hero} <smiled>, and soon {friend} showed {him} how to <talent=talent>. It took {hero} <few> tries. Then {he} <joy>.
    | "[Yes | Gladly | All right]," <said> {friend}. And while they played, it came out that {friend.he} could <talent=talent>! "<oh2>!" <cried> {hero}. "Can you teach me?"
oh2: Oh | Look | Hooray | Bravo | Fantastic | Again
n_end: Soon all the children wanted to {talent}, and {friend} was never alone again. But the first friend {friend.he} had made was {hero}. [A kind word can open a door. | One friend is enough to begin with.]
    | A week later, {hero} could {talent}, too, and {friend} knew how to <indoors>. They <danced2> until it was dark, and the street did not look strange anymore.
    | "I was afraid that nobody would like me," <said> {friend}. "I like you," <said> {hero}, "even if you could not {talent}." And they shared <snack>.
danced2: danced | laughed | talked | played | sang | practiced

night: <i_open>¶ <i_go>¶ <i_see> <i_end>
i_open: "<Noise=noise>." <hero=kid> sat up in bed. It was the middle of the night, and something had made a noise. {He} was <a trait> {girl}, but {he} pulled the <color> blanket up to {his} nose. <i_guess>
    | <meet> One night, {he} could not sleep. The clock struck [ten | eleven | twelve | one]. And then {he} heard it: "<Noise=noise>." <i_guess>
    | It was a <dark> night <homeland>. Everybody was asleep but <hero=kid>, who heard a strange noise: "<Noise=noise>." <i_guess>
dark: dark | cold | windy | long | still | foggy | black | stormy
i_guess: Was it <a ghost>, or was it <a dream>? | "It is <a ghost>," {he} thought, "or <few> of them!" | {He} thought of <few> <ghosts>, and {his} <heart> shook.
ghost: ghost | witch | bear | goblin | monster | crocodile | wolf | thief
i_go: {hero} took {his} <color> <toyfriend> in one arm and a <lamp3> in the other hand. {He} <crept> past the <old> <furniture>. "{Noise}," it went again, [a little louder | much closer | and then it was quiet].
    | "[Be brave | One step at a time | Monsters are afraid of light]" is what {his} <giver> always said. So {hero} put on {his} <color> <clothes> and <crept> into the hall. "{Noise}," it went.
lamp3: lamp | candle | broom | torch | slipper | pan
crept: crept | tiptoed | walked | crawled | slid | sneaked
i_see: {He} counted to <few> and looked. It was only <cause=noise.cause>! {hero} <joy>.
    | Then {he} saw it, and {he} had to laugh. There was no <ghost> at all. It was only <cause=noise.cause>!
    | "Who is there?" {he} <cried>. Nobody answered. {He} took <few> more steps, and what did {he} find? It was nothing but <cause=noise.cause>!
i_end: "Why are you up?" asked {his} <elder=elder> <softly>. {hero} told everything, and they had <treats> and a cup of <drink> in the middle of the night. [Most monsters are quite small in the light. | It is good to look before you run.]
    | Back in bed, {he} heard it again: "{Noise}." But now it sounded like a [song | lullaby | friend], and {hero} dreamed of <a color> <dream>.
    | <thenext>, {he} told {his} <giver> about {cause}. "{Noise}," {he} said in a deep voice, and both of them laughed. [Things look bigger in the dark. | A noise is only a noise.] {hero} slept well after that.

fable: <b_open>¶ <b_trap> <b_pass>¶ <b_help> <b_end>
b_open: Once upon a time, <a big> <giant=giant> and <a cute> <beast=beast> lived in the same <forest>. "[You are so small | You are no bigger than my toe | Watch out, or I will step on you]," the {giant} always said. "What are you good for?" The {beast} <bore>.
    | <A big> <giant=giant> lay in the sun and <ate2> <treats>. Along came <a cute> <beast=beast> with <a color> <feather2> on its head. "Give me one," said the {beast} <softly>, "and one day I will help you." The {giant} laughed so hard that <few> birds flew up. "You? Help me?" [But it gave the {beast} one. | But it was in a good mood, and it let the {beast} eat.]
    | There was once <a cute> <beast=beast> who lived under <a old> <perch>. Its neighbor was <a big> <giant=giant>. All the animals of the <forest> were afraid of the {giant}, but the {beast} <bore>.
big: big | huge | strong | proud | mighty | loud | grumpy | wild
forest: forest | valley | jungle | land | woods | swamp
bore: only smiled | said nothing | was not angry | looked up without fear | hummed a song | thought, "We will see"
ate2: ate | counted | shared | guarded
feather2: feather | leaf | flower | cap | ribbon | berry
b_trap: <oneday> the {giant} <beast.trap>. "Help!" it <roared>, so that <a old> <perch> fell over.
    | Then came <a fine> <season> day when the {giant} <beast.trap>. It <roared> for <few> hours.
roared: roared | bellowed | cried | howled | groaned | shouted
b_pass: <A cute> <fox> came by. "[I have no time | I am not strong enough | That is not my problem]," it <said> and <ran> on.
    | First came <few> <cute> <animals>, but they were too scared. Then came <a cute> <fox>, but it only [laughed | shook its head | took a look].
fox: fox | badger | goose | donkey | peacock | monkey | raccoon | pig
b_help: Then the {beast} came along. "[Hold still | Leave it to me | Do not worry]," it <said>. It <beast.can>. It took <few> [minutes | hours], but then the {giant} was free.
    | At last, the {beast} heard it. "[Now you will see what I am good for | Small can be strong | I come at once]!" it <cried>. It <beast.can>, and soon the {giant} was free.
b_end: "[Thank you | You saved me | I was wrong about you], my friend," said the {giant} <softly>. From that day on, the {beast} rode on the back of the {giant}, and they shared <treats>. [Nobody is too small to help. | Never laugh at the little ones.]
    | The {giant} bowed its head. "I will never laugh at you again," it said <softly>. And if they did not move away, the {giant} and the {beast} still live in the <forest2>, side by side.
    | That evening, the {giant} and the {beast} sat next to <a old> <perch> and ate <treats>. "[Big or small, we need each other | A good heart has no size | Help comes in all sizes]," said the {giant} <softly>.
forest2: hills | woods | wild | green valley | shade of the trees | same cave
"""

# A story that lacks one of these is reported by this name.
MUST = {"found": "lost object never found", "mended": "broken thing never mended", "sorry": "quarrel never made up"}
PRONOUNS = ["girl", "he", "him", "his", "himself"]      # a wrong one in these columns is a wrong pronoun


# -----------------------------------------------------------------------------------------------------------
# The grammar, compiled into operations. A str is told as it is; the others are these three.

class Ref(NamedTuple):
    """Tell column `column` of the row that variable `var` remembers."""
    var: int
    column: int


class Choice(NamedTuple):
    """Tell one of the alternatives; each is a tuple of operations."""
    alternatives: tuple
    logprobs: tuple
    cumulative: tuple       # probabilities summed up, without the last sum, which is 1
    rule: str


class Draw(NamedTuple):
    """Choose a row that no rival holds, remember it as variable `var`, and tell its column `column`."""
    var: int
    column: int
    source: tuple | Ref     # the rows, or where another variable's row has them
    rivals: tuple           # the other variables that are drawn from the same list


class Grammar:
    """A row is a tuple: its name, its name with an article, its other columns, and then all of these capitalised."""

    def __init__(self, lists: str, rules: str):
        blocks = re.findall(r"^(\w+), (\w+):(.*)\n((?: .*\n|\n)+)", lists, re.M)
        self.columns = ["", "a", *dict.fromkeys(" ".join(header for _, _, header, _ in blocks).split())]
        self.lists = {name: tuple(self._rows(header.split(), body)) for name, _, header, body in blocks}
        self.kinds = {name: kind for name, kind, _, _ in blocks}
        self.texts = dict(re.findall(r"^(\w+):((?:.*\n)(?: .*\n|\n)*)", rules, re.M))
        draws = [(var.lower(), source) for var, source in re.findall(r"<(?:\w+ )?(\w+)=([\w.]+)>", rules)]
        self.variables = list(dict.fromkeys(var for var, _ in draws))
        self.sources = {var: list(dict.fromkeys(source for v, source in draws if v == var)) for var in self.variables}
        self.rules = {}
        self.start = self.rule("story")

    def _rows(self, header, body):
        for line in re.sub(r"\n\s*;", " ;", body).strip().splitlines():
            names, *values = (cell.strip() for cell in line.split(";"))
            for name in names.split(", "):
                yield self._row(name, dict(zip(header, values, strict=True)))

    def _row(self, name, values):
        cells = [name, _article(name) + name, *map(values.get, self.columns[2:])]
        cells += [cell and cell[0].upper() + cell[1:] for cell in cells]
        return tuple(tuple(self._row(option, {}) for option in cell.split(", ")) if cell and ", " in cell else cell
                     for cell in cells)

    def rule(self, name: str) -> Choice:
        if name not in self.rules:
            text = re.sub(r" *¶ *", "\n", " ".join(self.texts[name].split()))
            tokens = re.findall(r"[][|]|<[^>]*>|\{[^}]*\}|[^][|<{]+", text)
            self.rules[name] = self._choice(iter([*tokens, "]"]), name)
        return self.rules[name]

    def _choice(self, tokens, rule=""):
        """The choice between all that comes before the closing bracket."""
        alternatives, weights = [[]], [1]
        for token in tokens:
            if token == "]":
                break
            if token == "|":
                alternatives.append([])
                weights.append(1)
            elif token == "[":
                alternatives[-1].append(self._choice(tokens))
            elif token[0] in "<{":
                alternatives[-1].append(self._operation(token))
            else:
                if not alternatives[-1]:
                    weight, token = re.fullmatch(r" ?(?:\((\d+)\) ?)?(.*)", token, re.S).groups()
                    weights[-1] = int(weight or 1)
                alternatives[-1].append(token)
        for ops in alternatives:
            if ops and isinstance(ops[-1], str):
                ops[-1] = ops[-1].removesuffix(" ")
        chances = [weight / sum(weights) for weight in weights]
        return Choice(tuple(map(_joined, alternatives)), tuple(map(math.log, chances)),
                      tuple(accumulate(chances))[:-1], rule)

    def _operation(self, token):
        match = re.fullmatch(r"[<{](?:(\w+) )?([\w.]+)(?:=([\w.]+))?[>}]", token)
        if not match:
            raise ValueError(f"the grammar has no such notation: {token}")
        article, name, source = match.groups()
        column = self.columns.index((article or "").lower())
        if token[1].isupper():
            column, name = column + len(self.columns), name[0].lower() + name[1:]
        if token[0] == "{":
            return self._ref(name, column)
        if source:
            rivals = [i for i, other in enumerate(self.variables) if other != name and source in self.sources[other]]
            rows = self.lists[source] if source in self.lists else self._ref(source)
            return Draw(self.variables.index(name), column, rows, tuple(rivals))
        if "." in name:                                         # remembered in a place that nobody refers to
            return Draw(len(self.variables), column, self._ref(name), ())
        choice = self.rule(name)
        if article:
            texts = [_joined([article[0] + _article(ops[0])[1:], *ops]) for ops in choice.alternatives]
            choice = choice._replace(alternatives=tuple(texts))
        return choice

    def _ref(self, name, column=0):
        var, _, attribute = name.partition(".")
        if var not in self.variables:
            var, attribute = "hero", var
        return Ref(self.variables.index(var), column + (self.columns.index(attribute) if attribute else 0))


def _article(text):
    return "an " if re.match(r"(?!uni|use|one)[aeiou]|hour|hones", text) else "a "


def _joined(ops):
    """Let an optional part of a sentence take a space beside it along; make neighbouring texts one."""
    ops = [*ops]
    for i, op in enumerate(ops):
        if isinstance(op, Choice) and () in op.alternatives:
            before = after = ""
            if i and isinstance(ops[i - 1], str) and ops[i - 1].endswith(" "):
                before, ops[i - 1] = " ", ops[i - 1][:-1]
            elif i + 1 < len(ops) and isinstance(ops[i + 1], str) and ops[i + 1].startswith(" "):
                after, ops[i + 1] = " ", ops[i + 1][1:]
            ops[i] = op._replace(alternatives=tuple(_joined([before, *alt, after]) if alt else () for alt in op[0]))
    joined = []
    for op in ops:
        if isinstance(op, str) and joined and isinstance(joined[-1], str):
            joined[-1] += op
        elif op != "":
            joined.append(op)
    return tuple(joined)


GRAMMAR = Grammar(LISTS, RULES)


# -----------------------------------------------------------------------------------------------------------
# Telling stories

LOG = [0.0, *(-math.log(n) for n in range(1, 1000))]      # the log-probability of one row out of n


def stories(seed: int, start: int = 0) -> Iterator[tuple[str, float]]:
    """Story start, start + 1, ... of a seed, without end, each with its log-probability in nats."""
    generator = random.Random()
    for i in count(start):
        generator.seed(f"{seed} {i}")                           # a str: hashed, and stable across versions
        parts, logprobs = [], []
        _tell((GRAMMAR.start,), [None] * (len(GRAMMAR.variables) + 1), parts.append, logprobs.append, generator.random)
        yield "".join(parts), math.fsum(logprobs)


def _tell(ops, memory, say, pay, chance):
    for op in ops:
        kind = type(op)
        if kind is str:
            say(op)
        elif kind is Ref:
            say(memory[op.var][op.column])
        elif kind is Choice:
            i = bisect(op.cumulative, chance())
            pay(op.logprobs[i])
            _tell(op.alternatives[i], memory, say, pay, chance)
        else:
            rows = _open_rows(op, memory)
            pay(LOG[len(rows)])
            row = memory[op.var] = rows[int(chance() * len(rows))]
            say(row[op.column])


def _open_rows(draw, memory):
    source = draw.source
    rows = memory[source.var][source.column] if type(source) is Ref else source
    held = [memory[rival] for rival in draw.rivals if memory[rival]]
    return [row for row in rows if row not in held] if held else rows


# -----------------------------------------------------------------------------------------------------------
# Judging stories

class Verdict(NamedTuple):
    ok: bool
    logprob: float | None       # of the derivation, in nats; None if not ok
    rule: str | None            # the first broken rule; None if ok
    detail: str                 # where it breaks, what stands there, and what should


class Flaw(NamedTuple):
    rule: str
    start: int
    end: int
    expected: str


def check(text: str) -> Verdict:
    """Could the grammar have told this story? Then with what probability; else which rule does it break first?"""
    text = text.strip()
    for logprobs, _ in derivations(text):
        return Verdict(True, math.fsum(logprobs), None, "")
    flaw = _first_flaw(" ".join(text.split()))
    found = " ".join(text.split())[flaw.start:max(flaw.end, flaw.start + len(flaw.expected) + 10)]
    return Verdict(False, None, flaw.rule, f"at {flaw.start}: {found!r}, expected {flaw.expected!r}")


def derivations(text: str, failures: list | None = None, steps: int = 20_000) -> Iterator[tuple[list, tuple]]:
    """Every way to tell this text: the log-probabilities of its choices, and its flaws.

    By default, there is one way at most, and no flaw. With a list for failures the parser is lenient, for the diagnosis:
    it takes a wrong word for a remembered one, and misses a rule of MUST, and notes it as a flaw; and appends for each
    way it tried in vain how far that went, the flaws up to there, and what was expected. Line breaks are spaces then.
    """
    lenient = failures is not None
    threads = [(0, ((GRAMMAR.start,), 0, None), (None,) * (len(GRAMMAR.variables) + 1), None, ())]
    while threads and steps:
        steps -= 1
        at, todo, memory, paid, flaws = threads.pop()
        while todo:                                             # until this thread forks, fails, or is through
            ops, i, after = todo
            if i == len(ops):
                todo = after
                continue
            op, todo = ops[i], (ops, i + 1, after)
            kind = type(op)
            if kind is Choice:
                if lenient and op.rule in MUST:
                    flaw = Flaw(MUST[op.rule], at, at, f"<{op.rule}>")
                    threads.append((at - (text[at - 1:at] == " "), todo, memory, paid, (*flaws, flaw)))
                for ops, logprob in zip(op.alternatives, op.logprobs, strict=True):
                    if lenient or not ops or type(ops[0]) is not str or text.startswith(ops[0], at):
                        threads.append((at, (ops, 0, todo), memory, (logprob, paid), flaws))
                break
            if kind is Draw:
                rows = _open_rows(op, memory)
                for row in rows:
                    if text.startswith(row[op.column], at):
                        then = *memory[:op.var], row, *memory[op.var + 1:]
                        threads.append((at + len(row[op.column]), todo, then, (LOG[len(rows)], paid), flaws))
                    elif lenient:
                        failures.append((_reach(text, at, row[op.column]), flaws, row[op.column]))
                break
            expected = op if kind is str else memory[op.var][op.column]
            if lenient:
                expected = expected.replace("\n", " ")
            if text.startswith(expected, at):
                at += len(expected)
            elif not lenient:
                break
            else:
                failures.append((_reach(text, at, expected), flaws, expected))
                words, rule = _confusion(op) if kind is Ref else (None, None)
                wrong = words and words.match(text, at)
                if not wrong:
                    break
                flaws = *flaws, Flaw(rule, at, wrong.end(), expected)
                at = wrong.end()
        else:
            if at == len(text):
                logprobs = []
                while paid:
                    logprob, paid = paid
                    logprobs.append(logprob)
                yield logprobs[::-1], flaws
            elif lenient:
                failures.append((at, flaws, "the end"))


def _reach(text, at, expected):
    """How far the text goes on as expected."""
    return at + len(os.path.commonprefix([text[at:at + len(expected)], expected]))


@functools.cache
def _confusion(ref):
    """What this word may be taken for: a pattern of the words in other rows, or any one word; and the rule it breaks."""
    words, kind = set(), ""
    for source in GRAMMAR.sources[GRAMMAR.variables[ref.var]]:
        var, _, attribute = source.partition(".")
        for name in GRAMMAR.sources[var] if attribute else [source]:
            kind = GRAMMAR.kinds[name]
            for row in GRAMMAR.lists[name]:
                options = row[GRAMMAR.columns.index(attribute)] if attribute else [row]
                words.update(option[ref.column] for option in options)
    if GRAMMAR.columns[ref.column % len(GRAMMAR.columns)] in PRONOUNS:
        kind = "pronoun"
    longest_first = sorted(filter(None, words), key=len, reverse=True)
    return re.compile(rf"({'|'.join(map(re.escape, longest_first))})\b|\w+"), f"wrong {kind}"


def _first_flaw(text):
    failures = []
    whole = [flaws for _, flaws in derivations(text, failures)]
    if whole:
        return min(whole, key=len)[0] if min(whole) else Flaw("not of the grammar", 0, 0, "other line breaks")

    def trusted(failure):                                       # a flaw is one if the story goes on well behind it
        reach, flaws, expected = failure
        while flaws and reach < flaws[-1].end + 20:
            reach, expected, flaws = flaws[-1].start, flaws[-1].expected, flaws[:-1]
        return reach, -len(flaws), flaws, expected

    reach, _, flaws, expected = max(map(trusted, failures))
    if flaws:
        return flaws[0]
    return Flaw("unfinished" if reach == len(text) else "not of the grammar", reach, reach, expected)


# -----------------------------------------------------------------------------------------------------------

def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("-n", type=int, default=1, help="how many stories to tell (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="each seed tells other stories (%(default)s)")
    parser.add_argument("--start", type=int, default=0, help="the number of the first one (%(default)s)")
    parser.add_argument("--check", metavar="FILE", help="judge the stories of FILE, or of stdin (-), instead: they end at "
                        "lines of <|endoftext|> or of dashes, else at blank lines")
    args = parser.parse_args()
    if args.check:
        judge(args.check)
        return
    for text, logprob in islice(stories(args.seed, args.start), args.n):
        print(text, end="\n\n", flush=True)
        print(f"[{-logprob / math.log(2):.1f} bits]", file=sys.stderr)


def judge(path):
    """Print the verdict on each story of a file, and how many are good; exit with 1 if any is not."""
    try:
        text = sys.stdin.read() if path == "-" else Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        print(f"cannot read {path}: {error}", file=sys.stderr)
        sys.exit(2)
    ends = r"^(?:<\|endoftext\|>|-{3,})\s*$"
    texts = re.split(ends if re.search(ends, text, re.M) else r"\n\s*\n", text, flags=re.M)
    verdicts = [check(text) for text in texts if text.strip()]
    for number, (ok, logprob, rule, detail) in enumerate(verdicts, 1):
        print(f"{number}: ok, {-logprob / math.log(2):.1f} bits" if ok else f"{number}: {rule}, {detail}")
    good = sum(verdict.ok for verdict in verdicts)
    print(f"{good} of {len(verdicts)} stories are good", file=sys.stderr)
    sys.exit(good < len(verdicts))


if __name__ == "__main__":
    main()
