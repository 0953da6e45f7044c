"""A built-in corpus of children's stories, with a known floor and a judge.

A probabilistic grammar tells little stories in the manner of TinyStories: as many as you like, each with
the exact log-probability of its choices. So the entropy of the corpus is known, and a model's distance to
it can be measured; and `check` says of any text whether the grammar could have told it, or which rule it
breaks first.

    python -m nanostlm.toystories -n 3 --seed 1          # three stories on stdout, their bits on stderr
    python -m nanostlm.toystories --check FILE           # the verdict on each story of a file ("-" is stdin)

    for text, logprob in stories(seed=0): ...   # endless; story i depends on (seed, i) alone
    check(text)                                 # Verdict(ok, logprob, rule, detail)

The grammar is data: LISTS has what a story draws from, RULES how it is told. The notation:

    name: text | text      a rule and its alternatives, equally likely; "(3) text" counts three times
    [text | text | ]       the same inside a sentence; an empty alternative takes a space beside it along
    <name>  <a name>       tell a rule here; put "a" or "an" before it; <Name> and <A name> are capitalised
    <hero=kid>             draw a row of the list kid, tell it, and remember it as hero. <a thing=toy> tells
                           it with its article, <girl hero=kid> tells its column girl instead. Variables that
                           are drawn from one list never hold the same row.
    <fix=thing.mend>       draw from a column that has several options; <thing.mend> does not remember which
    {hero}  {friend.he}    a remembered row, or a column of it; {a thing} has its article, {Thing} is
                           capitalised; {he} is {hero.he}
    ¶                      a new paragraph. All other line breaks are spaces.

A list starts with "name, kind: columns", then come its rows, their columns separated by ";". A first
column of several names, separated by ",", makes as many rows; another column with "," has several
options. The kind is what a wrong word is called: "wrong place".

To add a plot, write a rule that draws its hero, and add its name to `story`. Let no name begin a
paragraph: there, without a space before it, it is another token than elsewhere, which cannot be copied.
Whatever is drawn has to be told soon, and the alternatives of a choice have to differ in their words,
whatever follows them: then no text can be told in two ways, the parser finds the one, and -logprob is
the information in the text. The tests prove that for the whole grammar; they also prove the bounds of 60
and 250 words, and compare the entropy with the samples. Any change here makes other stories: give
VERSION a new number then, and the golden test its new sha256.
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

VERSION = "4"

# -----------------------------------------------------------------------------------------------------------
# The grammar: what stories are drawn from

LISTS = """
kid, name: girl he him his himself
    Lily, Mia, Anna, Sue, Emma, Lucy ; girl ; she ; her ; her ; herself
    Tom, Ben, Tim, Max, Leo, Jack ; boy ; he ; him ; his ; himself

elder, name: he him his
    mom, grandma ; she ; her ; her
    dad, grandpa ; he ; him ; his

neighbor, name: he him his
    Mrs. Bell, Miss Honey, Mrs. Gray, Miss Plum ; she ; her ; her
    Mr. Brown, Mr. Green, Mr. Baker, Mr. King ; he ; him ; his

toy, object:
    ball, kite, doll, drum, boat, truck, book, robot, teddy bear, lantern

look, object:
    red, blue, green, yellow, golden, striped, magic, sparkling

place, place: at
    the park ; in the park
    the beach ; on the beach
    the forest ; in the forest
    the farm ; on the farm
    the playground ; on the playground
    the market ; at the market

broken, object: broke mend
    kite ; lost its tail, ripped on a thorn ; paper and glue, a strip of silk
    doll ; lost an arm, tore its dress ; a needle and thread, a bit of yarn
    boat ; lost its mast, sprang a leak ; wood glue, hot wax
    train ; lost a wheel, bent its chimney ; a tin can, a tiny screw

animal, animal: home food
    kitten ; its cozy basket ; a saucer of milk, a bit of fish
    puppy ; its warm kennel ; a piece of sausage, a bowl of water
    bird ; its round nest ; a few seeds, some bread crumbs
    rabbit ; its deep burrow ; a carrot, a lettuce leaf

beast, animal:
    mouse, rat, squirrel, hamster

giant, animal:
    bear, lion, elephant, horse

trip, place: see do
    the seaside ; the long white beach, a lighthouse with a red roof, dolphins far out at sea
        ; swam in the cool waves, built a castle of sand, ate fish and chips
    the mountains ; the snowy peaks, a waterfall as tall as a tower, an eagle over the valley
        ; climbed to a high hut, drank from an icy stream, picked wild strawberries
    the big city ; the tall towers, a street full of lights, a clock with dancing figures
        ; rode an elevator to the very top, saw a museum full of bones, fed the pigeons on a square

keepsake, object:
    shell, smooth pebble, crystal, walking stick, postcard, snow globe, toy taxi, straw hat

fear, word: why
    the dark ; it was so very quiet, the shadows looked like monsters
    thunder ; it shook the whole house, it sounded like an angry giant
    deep water ; nobody could see the bottom, fish might nibble at toes
    big dogs ; they had such long teeth, they barked so much

gift, object: need
    cake ; flour and eggs, butter and sugar
    card ; paper and scissors, glue and glitter
    necklace ; beads and string, shells and thread
    scarf ; wool and two needles, yarn and a big hook

plant, object: grew
    sunflower ; as tall as the roof, taller than the fence
    pumpkin ; as big as a chair, too heavy to lift
    bean plant ; as high as the window, as long as a rope
    rose bush ; full of buds, as wide as a bed

plan, word: instead
    picnic ; spread a blanket on the living room floor, ate under the kitchen table
    camping trip ; built a tent of sheets, put the sleeping bags beside the stove
    garden party ; hung paper flowers on every lamp, danced with the brooms
    treasure hunt ; hid buttons all over the house, drew a map of every room

noise, word: cause
    tap tap tap ; a branch at the window, a bird at the window
    scratch scratch ; a cat at the door, a mouse behind the wall
    drip drip drip ; a tap in the kitchen, a leak in the roof
    hoo hoo hoo ; a big owl on the chimney, a bottle in the wind

food, object:
    pie, cookie, cake, muffin, bun, pretzel, waffle, pancake

vase, object:
    vase, teapot, bowl, lamp, mirror, plate, mug, glass
"""

# -----------------------------------------------------------------------------------------------------------
# The grammar: how stories are told

RULES = """
story: <lost> | <earn> | <quarrel> | <mend> | <animal> | <fear> | <trip> | <surprise> | <storm> | <share> |
    <grow> | <honest> | <night> | <fable>

trait: cheerful | curious | clever | gentle | kind | quiet | silly | playful | lively | funny | sweet |
    friendly | busy | dreamy | thoughtful | bright | polite | merry | smart | helpful | brave | honest |
    lucky | messy | noisy | careful | stubborn | shy | proud | quick | tidy | wild | bold | patient |
    generous | sleepy | calm | serious | cautious | talkative
outdoors: climb trees | jump over puddles | chase butterflies | watch the clouds | ride a bike | skip rope |
    fly kites | collect stones | pick flowers | look for bugs | feed the birds | dig holes | catch frogs |
    follow snails | play tag | roll down hills | play hide and seek | run barefoot | throw sticks | build
    dams | make mud pies | hop on one leg | whistle at birds | count ants | row boats | walk on stilts |
    rake leaves | catch raindrops | swing up high | wade in the creek | gather acorns | play soccer
indoors: draw pictures | sing songs | read stories | bake cookies | build towers | tell jokes | dance |
    paint | count the stars | make up games | do puzzles | write letters | dress up | fold paper boats |
    play cards | knit | juggle | play the piano | blow bubbles | cut out stars | look at maps | make masks |
    play chess | act like a pirate | sew buttons | carve wood | learn magic tricks | write poems | sort
    buttons | cook soup | invent machines | listen to the radio
likes: loved | liked
fine: sunny | bright | warm | clear | breezy | cool | lovely | quiet | golden | mild | windy | fresh |
    calm | hot | hazy | busy | pleasant | lazy | glorious | ordinary
season: spring | summer | autumn
daytime: morning | afternoon | day
weekday: Monday | Tuesday | Wednesday | Thursday | Friday | Saturday | Sunday
many: fifteen | twenty | thirty | forty | fifty | sixty
few: two | three | four | five | six | seven | eight | nine | ten | eleven | twelve
oneday: (4) One <fine> <weekday> [morning | afternoon | evening],
    | (2) One <fine> <season> <daytime>,
    | After [breakfast | lunch | school | supper] one <weekday>,
thenext: The next [morning | afternoon | day] | On <weekday> | <Few> days later | After <few> days
soon: Soon | After a while | Before long | A little later | At last | In the end | By and by | Then
ran: ran | hurried | walked | raced | skipped | hopped | marched | rushed | dashed | trotted | strolled |
    went | jogged | tiptoed | galloped | wandered | bounced | scurried | zoomed | danced
cried: cried | shouted | called | yelled | exclaimed | sang out | squealed | gasped | screamed | roared |
    bellowed
said: said | whispered | murmured | mumbled | declared | announced | muttered | remarked | stated | breathed
softly: softly | gently | slowly | quietly | kindly | calmly | warmly | simply | carefully | sweetly |
    lovingly | wisely | earnestly | shyly | firmly | thoughtfully | tenderly | politely | with a smile |
    with a wink | with a nod | with a grin | patiently | with a sigh
happy: happy | glad | proud | pleased | thankful | cheerful | merry | delighted | excited | joyful | lucky |
    content | grateful | jolly | thrilled | hopeful
sad: sad | unhappy | upset | gloomy | miserable | lonely | hopeless | sorry | lost | down | terrible |
    awful | sick | empty | bitter | helpless
weep: a tear ran down {his} [nose | cheek | chin]
    | {his} [lip | chin | voice] began to shake
    | {he} could hardly [speak | eat | sleep | swallow]
joy: <smiled> | was so <happy> that {he} <danced> | felt <happy> from head to toe | felt as <light> as
    <a feather>
smiled: smiled | grinned | laughed | clapped {his} hands | jumped up and down | giggled | beamed | did a
    little dance | turned a somersault | threw {his} hat into the air
danced: danced | sang | skipped | hummed | whistled | twirled | yodeled
light: light | free | merry | airy
feather: feather | bird | cloud | balloon | butterfly | soap bubble | leaf | lark | snowflake | kite |
    petal | moth | breeze | ribbon | bumblebee | sunbeam
color: gray | brown | white | black | purple | pink | orange | silver | violet | plaid | checkered |
    spotted | turquoise | rosy | beige | scarlet | lilac | cream | navy | colorful
clothes: coat | scarf | sweater | jacket | cape | shirt | vest | raincoat | apron | shawl | robe | poncho |
    blouse | cloak | parka | nightshirt
cute: little | fat | tiny | sleepy | shy | noisy | curious | hungry | lazy | clever | pretty | funny |
    brave | busy | wet | cheeky | fluffy | nervous | young | old | proud | quiet | grumpy | merry | lonely |
    jolly | dusty | friendly | plump | hasty | dreamy | bold | thirsty | muddy | gentle | cross
creature: snail | bee | robin | cat | beetle | moth | sparrow | spider | ladybug | caterpillar |
    grasshopper | crow | butterfly | lizard | blackbird | dove | owl | magpie | toad | wasp | starling |
    cricket | pigeon | mouse | raven | weasel | squirrel | dragonfly | worm | chipmunk | woodpecker |
    finch | slug | hamster | parrot | swallow
old: old | tall | broken | dusty | wobbly | crooked | wooden | rusty | mossy | painted | narrow | heavy |
    shiny | round | muddy | iron | tiny | huge | cracked | slippery | empty | sandy | wet | broad | lonely |
    famous | plain | hollow
perch: gate | wall | fence | roof | stone | bench | post | stump | bridge | barrel | ladder | signpost |
    bucket | cart | pump | log | crate | wagon | statue | well | haystack | doorstep | lamppost | mailbox |
    chimney | rock | tent | boat
mood: tall | old | young | jolly | thin | round | kind | sleepy | grumpy | busy | lonely | polite |
    cheerful | shy | strange | famous | tired | happy | worried | elegant | clumsy | wise | rich | poor |
    gentle | bald | silent | noisy
folk: baker | mailman | nurse | painter | fisherman | soldier | fiddler | clown | gardener | sailor |
    policeman | shepherd | teacher | carpenter | cook | tailor | doctor | farmer | singer | juggler |
    hunter | wizard | captain | mayor | pilot | butcher | miller | knight | dancer | writer | plumber |
    florist | grocer | barber | beggar | king
luggage: hat | coat | tie | umbrella | bag | bike | suitcase | beard | scarf | parrot | lantern | basket |
    violin | flag | cart | drum | cane | trumpet | bundle | sack | wig | briefcase | feather | newspaper |
    rose | bucket | harp | kite
passed: walked by | hurried past | came along | rode by | waved | nodded | stopped | sang a song
smell: hay | rain | bread | roses | pine | apples | mint | smoke | honey | soup | grass | cinnamon |
    flowers | fish | moss | coffee | lemons | onions | chocolate | lavender | earth | oranges | popcorn |
    vanilla
sound: a dog barked | a bell rang | a train whistled | a rooster crowed | a horn blew | a clock struck | a
    door slammed | somebody sang | an owl hooted | a cow mooed | a fiddle played | a gate creaked | a baby
    laughed | a drum beat | a donkey brayed | thunder grumbled | a frog croaked | a flute played | a cat
    purred | somebody sneezed
far: far away | somewhere | nearby | next door
tasty: sweet | tasty | fresh | big | tiny | warm | soft | lovely | yummy | round | golden | fine | little |
    sticky | crisp | juicy | crunchy | delicious | tender | ripe | huge | perfect | salty | crumbly
fruit: plums | apples | pears | cookies | peaches | buns | carrots | cherries | nuts | rolls | pancakes |
    muffins | grapes | dates | waffles | tomatoes | biscuits | berries | figs | pretzels | dumplings |
    radishes | candies | chestnuts | melons | crackers | tarts
filling: cheese | ham | jam | honey | butter | egg | tomato | fish | chicken | banana | cucumber | salad |
    peanut | mushroom | pepper | olive
drink: lemonade | milk | tea | cocoa | apple juice | water | ginger ale | berry juice | orange juice |
    cider | soda | grape juice
animals: ducks | goats | ponies | geese | puppies | sheep | rabbits | donkeys | hens | kittens | cows |
    pigeons | swans | turkeys | piglets | calves | foxes | squirrels | horses | dogs | frogs | monkeys |
    mice | peacocks
furniture: table | chair | sofa | bed | shelf | stove | door | curtain | piano | rug | cupboard | window |
    armchair | desk | mirror | closet | fireplace | wardrobe | dresser | lamp | bathtub | sink | footstool |
    bookcase
giver: uncle | aunt | cousin | godmother | sister | brother | neighbor | teacher | godfather | friend
toyfriend: pillow | doll | teddy bear | cat | dog | diary | goldfish | rabbit | hamster | parrot | robot |
    puppet
dream: dragon | whale | castle | rocket | snowman | giant | ship | mermaid | unicorn | circus | garden |
    pirate | volcano | comet | treasure | palace | balloon | princess | monster | rainbow | elephant |
    island | train | fairy
mud: bushes | mud | sand | leaves | grass | weeds | straw | stones
home: house | cottage | cabin | hut | farmhouse | tower | tent | mill | palace | barn | wagon | inn
homeland: by the sea | at the edge of town | on a green hill | near the woods | in a busy street | beside a
    mill | behind the church | under tall trees | in a quiet village | across from the school | by the
    railroad | over a bakery | at the end of the road | on the market square | near the harbor | between two
    lakes | behind the station | next to a pond | at the foot of a mountain | on a small island
cozy: small | little | white | cozy | crooked | snug | tidy | noisy | old | warm | narrow | pretty | round |
    wooden | funny | quiet | tall | sunny | drafty | pink

bug: <a cute> <creature> on <a old> <perch>
person: <a mood> <folk> with <a color> <luggage>
treats: <few> <tasty> <fruit>
snack: <treats> and <a filling> sandwich | <treats> and a bottle of <drink>
sights: <bug> and <person> | <few> <cute> <animals> and <bug> | <person> and <few> <cute> <animals>
scene: <A cute> <creature> sat on <a old> <perch>.
    | <A mood> <folk> <passed> with <a color> <luggage>.
    | It smelled of <smell>, and <far> <sound>.
    | <Few> <cute> <animals> ran past <a old> <perch>.
    | One cloud looked like <a cute> <creature>, and one like <a color> <dream>.
    | Somebody had painted <a color> <dream> on <a old> <perch>.
    | <A color> <clothes> hung on <a old> <perch>.
    | From <a cozy> <home> came the smell of <smell>.
outfit: {He} put on {his} <color> <clothes> and packed <snack>.
    | {He} wore <a color> <clothes> and carried <treats>.
meet: Once upon a time, there was <a trait> [little | young] <girl hero=kid> named {hero}. {He} lived
      <homeland> and <likes> to <outdoors>.
    | Once there was <a trait> <girl hero=kid> [named | called] {hero} who <likes> to <outdoors> and
      <indoors>.
    | In <a cozy> <home> <homeland>, there lived <a trait> <girl hero=kid> named {hero}. {He} <likes> to
      <indoors>.
    | Everybody knew <hero=kid>, <a trait> {girl} who lived in <a cozy> <home> <homeland>.
    | When the sun shone, <hero=kid> <likes> to <outdoors>, and when it rained {he} <likes> to <indoors>.

lost: <lost_open>¶ <lost_gone> <lost_ask>¶ <lost_look> <found> {hero} <joy>. <lost_end>
lost_open: <meet> {He} owned <a look=look> <thing=toy>, and {he} took it everywhere, even to [bed | school |
      the table | the bath].
    | There was once <a look=look> <thing=toy> that belonged to <a trait> <girl hero=kid> named {hero}.
      {His} <giver> had found it behind <a old> <perch>.
    | "Look what I have!" <cried> <hero=kid>, and {he} held up <a look=look> <thing=toy>. {His} <giver> had
      made it just for {him}.
lost_gone: <oneday> {hero} and {his} <elder=elder> <ran> to <place=place>. They saw <sights>. But when it was
      time to go home, the {thing} was gone.
    | <oneday> {hero} played <at place=place> while {his} <elder=elder> talked to <person>. <scene> Then it
      began to rain, and in the rush {he} left the {thing} behind.
    | <oneday> {hero} carried the {thing} to <place=place> to show it to {his} <elder=elder>. On the way {he}
      stopped to look at <sights>. When {he} got there, {his} hands were empty.
lost_ask: "Do not cry," said {his} {elder} <softly>. "[Lost things want to be found | Let us go back and
      look | Two pairs of eyes are better than one]."
    | "My {thing}!" <cried> {hero}. {He} felt so <sad> that <weep>.
    | {He} asked <person>, but nobody had seen it.
lost_look: So {hero} <ran> back to {place}. {He} searched in the <mud> and behind <a old> <perch>. <scene>
    | They went back to {place} and looked high and low. They found <a color> <junk> and <a old> <junk2>,
      but that was all.
    | "Where were you when you had it last?" asked {his} {elder}. {hero} remembered <bug>. {He} <ran> all
      the way to {place}.
junk: button | shoe | feather | mitten | coin | spoon | sock | marble
junk2: bottle | wheel | pipe | kettle | comb | shovel | watch | key
found: And there, behind <a old> <perch>, lay the {look} {thing}!
    | Then {he} saw something {look} under <a old> <perch>. It was {his} {thing}!
    | <A cute> <creature> sat in the <mud>, and next to it lay the {look} {thing}.
lost_end: From that day on, {he} tied <a color> ribbon to the {thing} whenever {he} went to {place}.
    | That night, {he} held the {look} {thing} in {his} arms and dreamed of <a color> <dream>.
    | "Next time," {he} <said>, "I will take better care of you." And the {look} {thing} always came home
      from {place}.

earn: <earn_open> "It costs <many> coins," <said> {boss}. But {hero} had only <few>. ¶ <earn_work>
    <scene> <earn_more>¶ <earn_turn> <earn_end>
earn_open: <meet> <oneday> {he} saw <a look=look> <thing=toy> in the window of <boss=neighbor>. {He} wanted
      it more than anything.
    | In the shop of <boss=neighbor>, between <a color> <jar> and <a old> <lamp>, stood <a look=look>
      <thing=toy>. Each day after school, <a trait> <girl hero=kid> named {hero} came in to look at it.
    | "How much is the <look=look> <thing=toy>?" asked <hero=kid>. {He} had seen it in the shop of
      <boss=neighbor>, between <a color> <jar> and <a old> <lamp>.
jar: book | jar | hat | box | cup | pencil | globe | broom
lamp: candle | lamp | drawer | chest | trunk | mirror | violin | statue
earn_work: So {he} went to work. {He} <jobhome>, {he} <jobyard>, and {he} <jobtown>.
    | "I will work for it," {he} <said>. {He} <jobhome> for {his} <giver>. {He} <jobyard> for <person>. And
      {he} <jobtown>.
    | On <weekday>, {he} <jobhome>. Then {he} <jobyard>, and after that {he} <jobtown>.
jobhome: swept the floor | washed the dishes | polished the shoes | folded the laundry | dusted the
    shelves | set the table | made the beds | peeled the potatoes | cleaned the windows | fed the cat |
    baked the bread | ironed the shirts
jobyard: raked the leaves | watered the garden | pulled the weeds | picked the berries | stacked the wood |
    painted the fence | fed the chickens | swept the path | mowed the lawn | cleaned the stable | milked the
    goat | washed the dog
jobtown: walked <few> dogs | sold <drink> on the corner | washed <few> cars | sold <tasty> <fruit> at the
    gate | carried <few> bags | caught <few> mice
earn_more: Each coin went into <a color> <purse>.
    | It was hard work, and {his} <arms> ached, but {he} thought of the {thing}.
    | Sometimes {he} wanted to buy <treats> instead, but {he} did not.
purse: jar | box | sock | can | purse | mug | bag | tin
arms: arms | hands | fingers | shoulders | feet | legs | knees | toes
earn_turn: <soon> {hero} had enough coins and <ran> to the shop. But the {thing} was not there! "Do not
      worry," said {boss} <softly>. "I hid it for you behind the <furniture>."
    | When {he} had enough coins, {he} put them down in a row. <scene> {boss} counted the coins <softly> and
      gave {him} the {thing}.
    | But the day before {he} had enough coins, {boss} stopped {him}. "I saw how hard you worked," said {boss}
      <softly>. "Here is the {thing}. Keep the coins."
earn_end: {hero} <ran> home with the {look} {thing} and <joy>. A thing that you earn is sweeter than a gift.
    | {hero} <joy>. No {thing} in the world was as fine as the {look} {thing} that {he} had earned.
    | That evening, {hero} put the {look} {thing} next to the <furniture>. {He} had paid for it with {his}
      own hands.

quarrel: <q_open>¶ <q_pull> <q_apart>¶ <q_sorry> <q_end>
q_open: Two children, <hero=kid> and <friend=kid>, were best friends. They <likes> to <outdoors> and to
      <indoors>. <q_start>
    | "It is mine!" <cried> <hero=kid>. "No, it is mine!" <cried> <friend=kid>. They had been best friends
      for <few> months. But then they had found <a look=look> <thing=toy> <at place=place>, next to <bug>.
    | <meet> {His} best friend was <friend=kid>, who <likes> to <indoors>. <q_start>
q_start: <oneday> they found <a look=look> <thing=toy> <at place=place>. "I saw it first!" <cried> {hero}.
      "But I touched it first!" <cried> {friend}.
    | <oneday> they sat <at place=place> with <a look=look> <thing=toy>. <scene> {hero} wanted to have the
      {thing} all day. So did {friend}.
q_pull: First {hero} pulled on one side, then {friend} pulled on the other. <rip>! The {thing} flew over
      <a old> <perch> and landed in the <mud>.
    | Then {friend} grabbed the {thing} and ran. {hero} ran after {friend.him}, past <sights>, until they fell
      down in the <mud>.
    | "You are <mean>!" <cried> {hero}. "And you are <selfish>!" <cried> {friend}. They threw <treats> at
      each other.
rip: Rip | Crack | Plop | Bang | Snap | Crash
mean: mean | rude | greedy | bossy | silly | horrible
selfish: selfish | nasty | unfair | rotten | stubborn | spoiled
q_apart: Then they went home, each one alone. {hero} sat behind the <furniture> and ate <treats>. But it was
      <dull> and <dull2> without {friend}.
    | For <few> days, they did not speak. {hero} tried to <indoors>, but it was <dull> and <dull2> without
      {friend}.
dull: quiet | boring | dull | empty | gray | cold
dull2: lonely | slow | strange | sad | sleepy | dark
sorry: "I am sorry," <said> {hero}. "A friend is better than any {thing}." "I am sorry, too," <said>
      {friend}.
    | Then both of them said "I am sorry" at the very same time, and they <friends>.
    | {hero} held out <treats>. "I am sorry," {he} <said>. "Me too," <said> {friend}.
friends: had to laugh | hugged | shook hands | began to giggle | felt much better | both turned red
q_sorry: <thenext>, {hero} <ran> to find {friend}. {friend} was already waiting next to <a old> <perch>.
      <sorry>
    | <thenext>, {hero} <ran> back to {place}. There was {friend} with <a cute> <creature>. <sorry>
q_end: After that, they shared the {look} {thing}. {hero} had it on <weekday2>, and {friend} had it on
      <weekday>. It is more fun to share than to win.
    | They gave the {look} {thing} to <person>, and they went off to <outdoors>. A friend is worth more than
      a toy.
    | They shared <treats> and all of {place}, and the {look} {thing} belonged to both of them.
weekday2: rainy days | sunny days | Mondays | Sundays | most days | good days

mend: <mend_open>¶ <mend_try>¶ <scene> <mended> <mend_end>
mend_open: <meet> {He} had <a look=look> <thing=broken> that {his} <elder=elder> had made for {him}.
      <mend_oops>
    | There once stood <a look=look> <thing=broken> next to <a color> <furniture> in the <home> of <a trait>
      <girl hero=kid> named {hero}. It came from {his} <elder=elder>. <mend_oops>
    | <rip>! On the floor, next to <a color> <furniture>, lay the <look=look> <thing=broken> of <hero=kid>.
      {He} had got it from {his} <elder=elder>. <A mood> <folk> had sat on it, and the {thing} <thing.broke>.
mend_oops: <oneday> {he} tripped over <a color> <clothes>, and the {thing} <thing.broke>.
    | <oneday> {he} bumped into the <furniture>, and the {thing} <thing.broke>.
mend_try: "It is ruined," <said> {hero}, and {he} felt so <sad> that <weep>. "Nothing is too broken for two
      pairs of hands," said {his} {elder} <softly>. "All that the {thing} needs is <fix=thing.mend>."
    | First, {hero} tried to mend it with <gum>. Then {he} tried it with <a color> <lace>. It only made a
      mess. "For a {thing}, <fix=thing.mend> may be better," said {his} {elder} <softly>.
    | At first, {hero} wanted to hide it behind the <furniture>. But {his} {elder} put down <a color> cup of
      <drink> and looked at it. "Wait," said {his} {elder} <softly>. "All that the {thing} needs is
      <fix=thing.mend>."
gum: mud | gum | honey | jam | soap | butter | tape | jelly | dough | syrup | toothpaste | snow
lace: shoelace | hair clip | leaf | straw | sock | candy wrapper | rubber band | sticker
mended: They worked for <few> hours, and with {fix} they made the {thing} whole again. {hero} <joy>.
    | {hero} found {fix} in <a old> <chest>, and {he} fixed the {thing} <softly>.
    | It took <few> tries and <few> cups of <drink>, but thanks to {fix} the {thing} was as good as new.
chest: chest | drawer | trunk | basket | box | crate | tin | bag
mend_end: "Now it has a story," said {his} {elder} <softly>. And {hero} loved the {look} {thing} even more
      than before.
    | {hero} put the {look} {thing} back next to the <furniture> and ate <treats> with {his} {elder}.
    | The {look} {thing} was not perfect, but it was loved. {hero} learned that patience can mend almost
      anything.

animal: <a_open> <a_what>¶ <a_help> <a_wait>¶ <a_home> <a_end>
a_open: <meet> <oneday> {he} was on the way to <place=place> when something <wept> behind <a old> <perch>.
    | Something <wept> behind <a old> <perch>. <hero=kid> stopped to listen. {He} was on the way to
      <place=place> with <snack>, but that could wait.
    | It was late <at place=place>. Only <hero=kid> was still there, in {his} <color> <clothes>. <scene> Then
      something <wept>.
a_what: It was <a baby> <pet=animal>, all alone in the <mud>.
    | It was <a baby> <pet=animal>, shaking with cold.
    | {He} saw <a baby> <pet=animal> that was stuck under <a old> <perch>.
wept: whimpered | rustled | squealed | sighed | moved
baby: small | tiny | baby | wet | young | thin | scared | shy | gray | lost | lonely | hungry
a_help: "Do not be afraid," <said> {hero}. {He} wrapped the {pet} in {his} <color> <clothes> and gave the
      {pet} <pet.food>.
    | Then {hero} knelt down <softly> and offered the {pet} <pet.food>. First it hid behind <a old> <perch>,
      but then it began to eat.
    | So {he} <ran> home and brought the {pet} <pet.food> and <a color> <clothes> to keep it warm.
a_wait: <scene> The {pet} stopped shaking. {He} named it <petname>.
    | For <few> days, it slept next to the <furniture> and ate <treats>. {He} named it <petname>.
    | {His} <giver> brought <a color> <purse> full of <straw>, and soon the {pet} felt better.
straw: hay | straw | leaves | moss | wool | feathers | rags | paper | cotton | ferns
petname: Button | Pepper | Biscuit | Pickle | Muffin | Sunny | Cloud | Lucky | Star | Pip | Ginger | Bean |
    Olive | Pumpkin | Cookie | Dot
a_home: Then {hero} took the {pet} back to {pet.home}. "Goodbye, little one," {he} <said> <softly>.
    | But {hero} knew that everybody needs a home. So {he} carried the {pet} back to {pet.home} and waved
      <softly>.
a_end: After that, each time {hero} came to {place}, the {pet} sat next to <a old> <perch> and watched {him}
      <outdoors>.
    | And when {hero} came to {place} <few> weeks later, there was the {pet}, twice as big and very <happy>.
    | {hero} <ran> home from {place} and felt <happy>. Even a small hand can help a lot.

fear: <fear_open>¶ <fear_day> <fear_told>¶ <fear_step> <fear_end>
fear_open: <meet> {He} was not afraid of <lions> or <ghosts>. But {he} was afraid of <fear=fear>, because
      <fear.why>.
    | "I am not afraid of <lions> or <ghosts>," said <hero=kid> to {his} <color> <toyfriend>. But {he} was
      afraid of <fear=fear>, because <fear.why>.
    | Only <a color> <toyfriend> knew the secret of <hero=kid>. {He} was afraid of <fear=fear>, because
      <fear.why>.
lions: lions | bulls | storms | pirates | wolves | snakes | mice | bees | bats | ladders | wasps | geese
ghosts: ghosts | witches | dragons | bears | goblins | giants | monsters | crocodiles
fear_day: <oneday> there was no way around {fear}. {hero} wanted to <hide>. {His} <heart> shook like <a
      feather>.
    | <oneday> there was no way around {fear}. {hero} turned as white as <milk> and wanted to <hide>.
milk: milk | snow | chalk | a sheet | flour | a goose | a lily | salt
hide: hide under the <furniture> | hide behind the <furniture> | run away | crawl into <a old> <chest> | fly
    to the moon | be <a creature> | become invisible | sleep for <few> days
heart: heart | knees | teeth | hands | lips | legs
fear_told: "I was afraid of {fear} too, when I was little," said {his} <elder=elder> <softly>. "A fear gets
      smaller when you look at it."
    | {His} <elder=elder> sat down beside {him} with <treats>. "Everybody is afraid of something," said
      {his} {elder} <softly>. "I am afraid of <lions>."
    | "[Just take one small step | Try it just once | You do not have to like it]," said {his} <elder=elder>
      <softly>. "I will sit here next to <bug> and wait for you."
fear_step: So {hero} put on {his} <color> <clothes> and took <few> deep breaths. {He} <dared>. And nothing bad
      happened!
    | First, {hero} thought of <a color> <dream> and counted to <few>. Then {he} <dared>. <scene>
    | "I can do it," <said> {hero} <softly>. {He} <dared>. <scene> The next time it was almost easy.
fear_end: After that, {hero} was no longer afraid of {fear}. {He} <joy>, and {he} told {his} {elder} about
      it [<few> times | over <treats>].
    | "I was scared of {fear}, but I did it anyway," <said> {hero}, and {he} ate <treats> with {his}
      {elder}.
    | Now {fear} did not seem so terrible. {hero} <joy>, and {his} {elder} <smiled2>.
dared: took one small step and then another | counted to ten with open eyes | held one flat hand out | sang a
    song out loud | looked right at it | stood as still as <a creature>
smiled2: smiled | nodded | cheered | clapped | winked | laughed

restless: excited | happy | curious | nervous | restless | thrilled | glad | hopeful
trip: <t_open> <t_pack>¶ <t_there>¶ <t_find> <t_home>
t_open: "Pack your bag, <hero=kid>!" <cried> {his} <elder=elder>. "On <weekday> we are going to
      <trip=trip>!" {hero} <joy>.
    | <meet> {He} had read <few> books about <trip=trip>. <oneday> {his} <elder=elder> came in with <few>
      tickets.
    | For <few> nights, <hero=kid> had been too <restless> to sleep. {His} <elder=elder> wanted to take
      {him} to <trip=trip>!
t_pack: {He} packed <treats>, <a color> <clothes>, and <a old> <camera>. They traveled <ride> for <few> hours.
    | {hero} took {his} <color> <clothes> and <snack>. They traveled <ride>, next to <person>.
ride: by train | by bus | by plane | by boat | in an old car | in a dusty jeep | on a big ferry
camera: map | camera | compass | notebook | telescope | pen | whistle | lamp
t_there: What a place {trip} was! They saw <trip.see>. Then they <trip.do> and met <sights>. {He} <joy>.
    | "Is that {trip}?" asked {hero} <softly>. They saw <trip.see>. Then they <trip.do>. It smelled of
      <smell>, and <far> <sound>.
    | "Welcome to {trip}!" <cried> <a mood> <folk>. They saw <trip.see>. Then they <trip.do>. <scene>
t_find: On the last day, {hero} found <a thing=keepsake> next to <a old> <perch>.
    | Before they left, {his} {elder} bought {him} <a thing=keepsake> from <person>.
t_home: At home, the {thing} got a place next to the <furniture>. Whenever {hero} looked at it, {he} thought
      of {trip} and <smiled>.
    | {hero} showed the {thing} to {his} <giver> and talked about {trip} for <few> hours. The world is big,
      and there is so much to see.
    | That night, {hero} put the {thing} under {his} <color> pillow and dreamed of {trip}.

surprise: <s_open>¶ <s_work> <s_oops>¶ <s_day> <s_end>
s_open: "Shh!" <said> <hero=kid> to {his} <color> <toyfriend>. "On <weekday>, my <elder=elder> has a birthday.
      I want to make <a look=look> <thing=gift>, but it must be a secret."
    | <meet> {His} <elder=elder> had a birthday on <weekday>. "I will make <a look=look> <thing=gift>," {he}
      thought, "and nobody must know."
    | <oneday> <hero=kid> counted the days. {His} <elder=elder> had a birthday in <few> days! {He} had no
      money for a present. "But I can make <a look=look> <thing=gift>," {he} <said>.
s_work: The {thing} needed <thing.need>. {hero} hid behind the <furniture> for <few> hours. <scene>
    | For the {thing}, {he} took <thing.need> from <a old> <chest>. Then {he} locked the door and began.
      <scene>
    | What {he} needed for the {thing} was <thing.need>. <A mood> <folk> gave {him} some in return for
      <treats>. <scene>
s_oops: The first {thing} looked like <a cute> <creature>. {He} felt <sad>, but {he} began again, and the
      second one was just right.
    | "What are you doing there?" asked {his} {elder}. {hero} hid the {thing} under {his} <color> <clothes>.
      "Nothing," {he} <said>.
    | {His} {elder} called {him} <few> times. But {hero} only worked faster. There was <fluff> on {his} nose
      and <fluff2> in {his} hair.
fluff: paint | flour | glue | dust | ink | soot
fluff2: thread | wool | paper | straw | sugar | soap
s_day: When the day came, {hero} brought the {thing} and <treats>. "Happy birthday, dear {elder}!" {he}
      <cried>. {His} {elder} <gasped>.
    | On the great day, {hero} put the {thing} next to the <furniture> and hid. {His} {elder} came in and
      <gasped>. Then {hero} jumped out in <a color> <clothes>.
    | Early in the morning, {hero} <ran> into the bedroom with the {thing}. "It is for you, dear {elder},"
      {he} <said> <softly>. {His} {elder} <gasped>.
gasped: laughed out loud | clapped and clapped | could not speak | sat down with surprise | cried for joy |
    danced around
s_end: "This {look} {thing} is the best present I ever got," said {his} {elder} <softly>. And {hero} <joy>.
    | {His} {elder} talked about the {look} {thing} for <few> years. A gift made with love is the finest of
      all.
    | They sat down with <snack>, and {his} {elder} looked at the {look} {thing} again and again.

storm: <w_open>¶ <w_rain> <w_sad>¶ <w_idea> <w_end>
w_open: <meet> {His} <elder=elder> had promised {him} <a plan=plan> <at place=place> on <weekday>. <outfit>
    | "Is it <weekday> yet?" asked <hero=kid>. {His} <elder=elder> laughed. They had planned <a plan=plan>
      <at place=place>. <outfit>
    | For <few> days, <hero=kid> had looked forward to <a plan=plan> <at place=place> with {his}
      <elder=elder>. <outfit>
w_rain: But then <a rumble> came from above, and the sky turned as gray as <a mouse>. It began to pour on
      <bug>.
    | They were already at the door when <a rumble> came from above. <plink>! One drop fell on {his} nose.
      <plink2>! Another one fell on {his} <color> <clothes>.
rumble: rumble | roar | crash | growl | howl | hiss
mouse: mouse | stone | donkey | wolf | whale | wet sock
plink: Plink | Plop | Splash | Splat | Pling | Drip
plink2: Plonk | Splosh | Pitter | Patter | Drop | Spat
w_sad: "Our {plan} is ruined!" <cried> {hero}. {He} felt so <sad> that <weep>.
    | "Go away, rain!" {he} <cried>. But the rain did not listen, and {he} sat down beside the <furniture>.
    | {hero} looked out. There was only <bug>. "No {plan} today," {he} <said>.
w_idea: "Who says so?" asked {his} {elder} <softly>. "We will have the {plan} right here." They
      <plan.instead>. The <furniture> was {place}, and <a color> <clothes> was the sky.
    | But {his} {elder} looked at the <furniture> and had an idea. "If we cannot go to {place}, then {place}
      must come to us!" So they had the {plan} at home. They <plan.instead> and ate <treats>.
    | Then {hero} looked at {his} <color> <toyfriend> and had an idea. They called the kitchen {place}. For
      the {plan}, they <plan.instead>. {His} {elder} brought <treats>.
w_end: When the sun came out, they did not even notice. <scene> It was the <best> {plan} of {his} life.
      {hero} <joy>.
    | <soon> there was a rainbow over {place}. But {hero} and {his} {elder} had <treats> and did not want to
      end their {plan}.
    | {hero} <joy>. And on the next rainy day, {he} asked {his} {elder} for <a fine2> {plan} again.
best: best | funniest | finest | wildest | longest | nicest
fine2: big | little | long | wild | real | secret

share: <h_open>¶ <h_meet> <h_doubt>¶ <h_give> <h_end>
h_open: <meet> <oneday> {he} got <a tasty> <treat=food> from {his} <giver>. {He} <ran> to <place=place> to
      eat it all alone.
    | There was only one <treat=food> left in the shop of <boss=neighbor>, and <hero=kid> had bought it.
      {He} <ran> with it to <place=place>. It smelled of <smell>, and <far> <sound>.
    | "This is the finest <treat=food> in the world," <said> <hero=kid>, "and it is all for me." {He} sat
      down with it <at place=place>. <scene>
h_meet: But there sat <friend=kid> in <a color> <clothes>. "<A cute> <creature> ate my lunch," {friend.he}
      <said> <softly>.
    | Then <friend=kid> came by in <a color> <clothes>. "My stomach growls like <a beast2>," <said> {friend}
      <softly>.
    | Not far away, <friend=kid> was looking for berries. But there was only <bug>. "I am so hungry," <said>
      {friend}.
beast2: bear | lion | tiger | wolf | dragon | motor
h_doubt: {hero} thought of <treats>, but {he} had nothing but the {treat}.
    | {hero} hid the {treat} under {his} <color> <clothes>. But then {he} could not enjoy it.
    | {hero} looked at <bug>. But {he} could not eat while a friend was hungry.
h_give: So {he} broke the {treat} in two and gave one half to {friend} <softly>. They sat side by side and
      watched <sights>.
    | "One for you and one for me," <said> {hero}, and {he} broke the {treat} in two. Even <bug> got a crumb.
    | "Come here," <said> {hero} <softly>. They shared the {treat}, and {friend} told {him} about <sights>.
h_end: <thenext>, it was {hero} who had nothing to eat. But {friend} came to {place} with <snack>. "Today it
      is my turn," <said> {friend}.
    | {hero} <joy>, because half of a {treat} with {friend} tastes better than a whole one alone.
    | After that, {hero} and {friend} went to {place} every <weekday> and shared <treats>. What you give
      comes back to you.

grow: <g_open>¶ <g_sow> <g_wait>¶ <g_sprout> <g_end>
g_open: <meet> On {his} birthday, {he} got <a color> <purse> from {his} <elder=elder>. There was only one
      <seed> seed in it. "Just you wait," said {his} {elder} <softly>.
    | "What is that?" asked <hero=kid>. {His} <elder=elder> held up <a seed> seed. "If you are patient,"
      said {his} {elder} <softly>, "it will make you <happy>."
    | On the windowsill of <hero=kid> stood <a color> pot full of earth. {His} <elder=elder> had put
      <a seed> seed into it. <scene>
seed: tiny | round | brown | flat | black | striped
g_sow: So {hero} gave it water from <a color> <purse>. Then {he} sat down with <treats> and waited.
    | Each morning, {hero} sang it a song about <a color> <dream> and watered it <softly>.
g_wait: On <weekday>, there was nothing to see. After <few> days, there was still nothing to see but <bug>.
      "Seeds have their own clock," said {his} {elder} <softly>.
    | {hero} wanted to dig it up. "Good things take time," said {his} {elder} <softly>. So {hero} <jobhome>
      and <jobyard> instead.
    | {He} waited for <few> days and just as many nights. <scene> {He} felt <sad>, but {he} did not give up.
g_sprout: Then, on <a fine> <daytime>, there was something green! "<oh>!" <cried> {hero}. It grew and grew,
      and by the end of <season> it was <a plant=plant>, <plant.grew>.
    | <thenext>, {hero} saw a green tip and <joy>. It got <few> leaves, and then <few> more. It was
      <a plant=plant>, <plant.grew>.
oh: Oh | Look | Hooray | At last | Hello | It is alive
g_end: {hero} showed the {plant} to <person>. "I only had to wait," {he} told {his} {elder}.
    | All big things begin small, and {his} {elder} was as <happy> about the {plant} as {hero}.
    | That evening, {hero} sat next to the {plant} with {his} {elder} and ate <treats>.

honest: <c_open>¶ <c_hide> <c_worry>¶ <c_tell> <c_end>
c_open: <meet> {His} <elder=elder> had <a look=look> <thing=vase> from <abroad>. But on <weekday> {hero} was
      <playing> in the house, and <rip2>! It lay next to the <furniture> in <few> pieces. <scene>
    | <rip>! On the floor lay <few> pieces of <a look=look> <thing=vase>, and next to them stood <hero=kid>.
      {He} had been <playing> in the house. The {thing} belonged to {his} <elder=elder>, who had brought it
      from <abroad>.
    | <oneday> <hero=kid> was <playing> in the house, though {his} <elder=elder> had said no. And <rip2>!
      There went the <look=look> <thing=vase> from <abroad>. It broke into <few> pieces.
playing: playing ball | skipping rope | riding a bike | throwing apples | dancing | chasing the cat |
    juggling | jumping around
rip2: crash | bang | crack
abroad: a far country | the mountains | the city | an island | the desert | the north | the south | a big
    ship
c_hide: Quickly, {hero} hid the pieces behind the <furniture>. When {his} {elder} asked about the {thing},
      {he} said, "It was <blame>."
    | With shaking hands, {he} put the pieces into <a old> <chest>. At supper, there were <treats>, but {he}
      could not eat. "Are you ill?" asked {his} {elder}. "No," {he} <said>.
blame: the cat | the dog | the wind | <a cute> <creature> | <a mood> <folk>
c_worry: But the lie felt as heavy as <stone>. {hero} could not sleep and could not <indoors>.
    | But the lie felt as heavy as <stone>. Even <bug> seemed to look at {him} and know.
stone: a stone | a brick | lead | an anchor | a cannon ball | a piano | an elephant | wet sand
c_tell: <thenext>, {hero} went to {his} {elder}, past <bug>. "I broke the {look} {thing}," {he} <said>
      <softly>. {His} {elder} <listened>.
    | Outside, <few> <cute> <animals> ran past <a old> <perch>, but {he} did not even look. "It was me,"
      {he} <said>. "I broke your {look} {thing}." {His} {elder} <listened>.
listened: was silent for a while | nodded <softly> | put down a cup of <drink> | took {him} in both arms
c_end: "Thank you for telling me," said {his} {elder} <softly>. Then they glued the {look} {thing} together
      on the <furniture>, piece by piece.
    | "I was sad about the {thing}," said {his} {elder} <softly>, "but a lie makes me sadder." To make up
      for it, {hero} <jobhome> and <jobyard>.
    | "I knew it all along," said {his} {elder} <softly>. They ate <treats>, and {hero} felt as <light> as
      <a feather>. The truth is easier to carry than a lie.

night: <i_open>¶ <i_go>¶ <i_see> <i_end>
i_open: "<Noise=noise>." <hero=kid> sat up in bed. It was the middle of the night. {He} was <a trait>
      {girl}, but {he} pulled the <color> blanket up to {his} nose. <i_guess>
    | <meet> One <dark> night, {he} could not sleep. And then {he} heard it: "<Noise=noise>." <i_guess>
    | It was <a dark> night <homeland>. Everybody was asleep but <hero=kid>, who heard a strange noise:
      "<Noise=noise>." <i_guess>
dark: dark | cold | windy | long | still | foggy | black | stormy
i_guess: Was it <a cute> <ghost>, or was it <a color> <dream>?
    | "It is <a cute> <ghost>," {he} thought, "or <few> of them!"
    | {He} thought of <few> <cute> <ghosts>, and {his} <heart> shook.
ghost: ghost | witch | bear | goblin | monster | crocodile | wolf | thief
i_go: Slowly, {hero} took {his} <color> <toyfriend> in one arm and <a color> <lamp3> in the other hand. {He}
      <crept> past <a old> <furniture> and <a color> <furniture2>. "{Noise}," it went again.
    | At last, {hero} put on {his} <color> <clothes>, took <a old> <lamp3>, and <crept> past the <furniture>.
      Outside, <bug> listened, too. "{Noise}," it went, a little louder.
furniture2: coat rack | vase | umbrella stand | doll house | clock | broom | toy chest | bird cage | flower
    pot | basket
lamp3: lamp | candle | broom | torch | slipper | pan | umbrella | spoon
crept: crept | tiptoed | walked | crawled | slid | sneaked
i_see: Bravely, {he} counted to <few> and looked. "{Noise}," it went, and it was only <cause=noise.cause>!
      {hero} <joy>.
    | Then {he} saw it. There was no <ghost> at all. "{Noise}," it went, and it was only <cause=noise.cause>!
      {hero} <joy>.
i_end: "Why are you up?" asked {his} <elder=elder> <softly>. {hero} told about {cause}, and they had
      <treats> in the middle of the night.
    | Back in bed, {he} heard it again: "{Noise}." But now it was like a song, and {hero} dreamed of
      <a color> <dream>.
    | <thenext>, {he} told {his} <giver> about {cause}. "{Noise}," {hero} <said> in a deep voice, and both
      of them laughed. Things look bigger in the dark.

fable: <b_open>¶ <b_trap> <b_pass>¶ <b_help> <b_end>
b_open: Once upon a time, <a big> <giant=giant> and <a cute> <beast=beast> lived in the same <forest>. "You
      are so small," the {giant} always said. "What are you good for?" But the {beast} only <danced>.
    | <A big> <giant=giant> lay in the sun and ate <treats>. Along came <a cute> <beast=beast> in <a color>
      <clothes>. "Give me one," it said <softly>, "and one day I will help you." The {giant} laughed so hard
      that <few> birds flew up.
    | There was once <a cute> <beast=beast> who lived under <a old> <perch>. Its neighbor was <a big>
      <giant=giant>. Everybody was afraid of the {giant}, but the {beast} only <danced>.
big: big | huge | strong | proud | mighty | loud | grumpy | wild
forest: forest | valley | jungle | land | woods | swamp
b_trap: <oneday> the {giant} <trapped>. It <roared> so loudly that <a old> <perch> fell over.
    | On <a fine> <season> <daytime>, the {giant} <trapped>. It <roared> for <few> hours.
trapped: was caught in a hunter's net | was tied to a post with a thick rope | hung in a trap of ropes
chewed: chewed through the knots one by one | nibbled at the rope until it snapped | bit the rope in two
roared: roared | bellowed | cried | howled | groaned | shouted
b_pass: <Few> <cute> <animals> came by, but they did not know what to do. Then came <a cute> <fox>, but it
      only looked and <ran> on.
    | <A cute> <fox> came by. "I have no time," it <said>, and it <ran> on with <treats>. <scene>
fox: fox | badger | goose | donkey | peacock | monkey | raccoon | pig
b_help: Then the {beast} came along in <a color> <clothes>, with <treats>. "Leave it to me," it <said>. It
      <chewed>, and soon the {giant} was free.
    | At last, the {beast} heard it. "Now you will see what I am good for!" it <cried>. It <chewed>, and soon
      the {giant} was free.
b_end: "Thank you, my friend," said the {giant} <softly>. From that day on, the {giant} and the {beast}
      shared <treats>. Nobody is too small to help.
    | The {giant} was so <happy> that it <danced>. And after that, it never laughed at the {beast} again.
    | That evening, the {giant} and the {beast} sat next to <a old> <perch> and ate <treats>. A good heart
      has no size.
"""

# A story that lacks one of these is reported by this name.
MUST = {
    "found": "lost object never found",
    "mended": "broken thing never mended",
    "sorry": "quarrel never made up",
}
PRONOUNS = ["girl", "he", "him", "his", "himself"]  # a wrong word from these columns is a wrong pronoun


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
    cumulative: tuple  # probabilities summed up, without the last sum, which is 1
    rule: str


class Draw(NamedTuple):
    """Choose a row that no rival holds, remember it as variable `var`, and tell its column `column`."""

    var: int
    column: int
    source: tuple | Ref  # the rows, or where another variable's row has them
    rivals: tuple  # the other variables that are drawn from the same list


class Grammar:
    """Both texts, compiled. A row is a tuple: name, name with article, other columns; all capitalised."""

    def __init__(self, lists: str, rules: str):
        blocks = re.findall(r"^(\w+), (\w+):(.*)\n((?: .*\n|\n)+)", lists, re.M)
        self.columns = ["", "a", *dict.fromkeys(" ".join(header for _, _, header, _ in blocks).split())]
        self.lists = {name: tuple(self._rows(header.split(), body)) for name, _, header, body in blocks}
        self.kinds = {name: kind for name, kind, _, _ in blocks}
        self.texts = dict(re.findall(r"^(\w+):((?:.*\n)(?: .*\n|\n)*)", rules, re.M))
        draws = [(var.lower(), source) for var, source in re.findall(r"<(?:\w+ )?(\w+)=([\w.]+)>", rules)]
        self.variables = list(dict.fromkeys(var for var, _ in draws))
        self.sources = {
            var: list(dict.fromkeys(source for v, source in draws if v == var)) for var in self.variables
        }
        self.rules = {}
        self.start = self.rule("story")

    def _rows(self, header, body):
        for line in re.sub(r"\n\s*;", " ;", re.sub(r",\s*\n", ",", body)).strip().splitlines():
            names, *values = (cell.strip() for cell in line.split(";"))
            for name in re.split(r",\s*", names):
                yield self._row(name, dict(zip(header, values, strict=True)))

    def _row(self, name, values):
        cells = [name, _article(name) + name, *map(values.get, self.columns[2:])]
        cells += [cell and _capitalised(cell) for cell in cells]
        return tuple(
            tuple(self._row(option, {}) for option in re.split(r",\s*", cell))
            if cell and "," in cell
            else cell
            for cell in cells
        )

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
        return Choice(
            tuple(map(_joined, alternatives)),
            tuple(map(math.log, chances)),
            tuple(accumulate(chances))[:-1],
            rule,
        )

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
            rivals = tuple(
                i for i, other in enumerate(self.variables) if other != name and source in self.sources[other]
            )
            rows = self.lists[source] if source in self.lists else self._ref(source)
            return Draw(self.variables.index(name), column, rows, rivals)
        if "." in name:  # remembered in a place that nobody refers to
            return Draw(len(self.variables), column, self._ref(name), ())
        alternatives = self.rule(name).alternatives
        if article:
            alternatives = tuple((_article(ops[0]) + ops[0], *ops[1:]) for ops in alternatives)
        if token[1].isupper():
            alternatives = tuple((_capitalised(ops[0]), *ops[1:]) for ops in alternatives)
        return self.rule(name)._replace(alternatives=alternatives)

    def _ref(self, name, column=0):
        var, _, attribute = name.partition(".")
        if var not in self.variables:
            var, attribute = "hero", var
        return Ref(self.variables.index(var), column + (self.columns.index(attribute) if attribute else 0))


def _article(text):
    return "an " if re.match(r"(?!uni|use|one)[aeiou]|hour|hones", text) else "a "


def _capitalised(text):
    return text[0].upper() + text[1:]


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
            full = (_joined([before, *inner, after]) if inner else () for inner in op.alternatives)
            ops[i] = op._replace(alternatives=tuple(full))
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

LOG = [0.0, *(-math.log(n) for n in range(1, 1000))]  # the log-probability of one row out of n


def stories(seed: int, start: int = 0) -> Iterator[tuple[str, float]]:
    """Story start, start + 1, ... of a seed, without end, each with its log-probability in nats."""
    generator = random.Random()
    for i in count(start):
        generator.seed(f"{seed} {i}")  # a str: hashed, and stable across versions
        memory, parts, logprobs = [None] * (len(GRAMMAR.variables) + 1), [], []
        _tell((GRAMMAR.start,), memory, parts.append, logprobs.append, generator.random)
        yield "".join(parts), math.fsum(logprobs)


def _tell(ops, memory, say, pay, chance):
    """Tell operations: say what they tell, pay the log-probability of each choice."""
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
    """The rows to choose from: all that no rival holds."""
    source = draw.source
    rows = memory[source.var][source.column] if type(source) is Ref else source
    held = [memory[rival] for rival in draw.rivals if memory[rival]]
    return [row for row in rows if row not in held] if held else rows


# -----------------------------------------------------------------------------------------------------------
# Judging stories


class Verdict(NamedTuple):
    ok: bool
    logprob: float | None  # of the derivation, in nats; None if not ok
    rule: str | None  # the first broken rule; None if ok
    detail: str  # where it breaks, what stands there, and what should


class Miss(NamedTuple):
    """Where one way to tell a text failed, and how it would go on if the flaw were passed over."""

    reach: int  # up to here, the text is as it should be
    start: int  # from here on, `expected` should stand there
    expected: str
    rule: str | None = None  # what it would be to pass over it; None if that cannot be done
    end: int = 0  # where to go on then
    thread: tuple | None = None
    known: bool = False  # a word of the grammar stands there, only the wrong one


def check(text: str) -> Verdict:
    """Could the grammar have told this story? With what probability; or which rule does it break first?"""
    text = text.strip()
    for logprobs in derivations(text):
        return Verdict(True, math.fsum(logprobs), None, "")
    text = " ".join(text.split())
    rule, miss = _diagnose(text)
    found = text[miss.start : max(miss.reach, miss.start + len(miss.expected)) + 10]
    return Verdict(False, None, rule, f"at {miss.start}: {found!r}, expected {miss.expected!r}")


def derivations(text: str) -> Iterator[list[float]]:
    """Every way to tell this text, as the log-probabilities of its choices: there is one, or none."""
    for _, _, _, paid in _parse(text, [_beginning()]):
        logprobs = []
        while paid:
            logprob, paid = paid
            logprobs.append(logprob)
        yield logprobs[::-1]


def _beginning():
    return 0, ((GRAMMAR.start,), 0, None), (None,) * (len(GRAMMAR.variables) + 1), None


def _parse(text, threads, misses=None, steps=20_000):
    """Follow each thread (position, what is still to be told, memory, paid) through all choices, and yield
    those that end with the text. With a list for the misses, each failure is appended, and line breaks are
    spaces.
    """
    while threads and steps:
        steps -= 1
        at, todo, memory, paid = threads.pop()
        while todo:  # until this thread forks, fails or ends
            ops, i, after = todo
            if i == len(ops):
                todo = after
                continue
            op, todo = ops[i], (ops, i + 1, after)
            kind = type(op)
            if kind is Choice:
                if misses is not None and op.rule in MUST:
                    goes_on = at - text.startswith(" ", at - 1), todo, memory, paid
                    misses.append(Miss(at, at, f"<{op.rule}>", MUST[op.rule], at, goes_on))
                for ops, logprob in zip(op.alternatives, op.logprobs, strict=True):
                    first = ops[0] if ops and type(ops[0]) is str else ""
                    if misses is not None:
                        first = first.replace("\n", " ")
                    if text.startswith(first, at):
                        threads.append((at, (ops, 0, todo), memory, (logprob, paid)))
                    elif misses is not None:
                        misses.append(Miss(_reach(text, at, first), at, first))
                break
            if kind is Draw:
                rows = _open_rows(op, memory)
                for row in rows:
                    if text.startswith(row[op.column], at):
                        then = *memory[: op.var], row, *memory[op.var + 1 :]
                        threads.append((at + len(row[op.column]), todo, then, (LOG[len(rows)], paid)))
                    elif misses is not None:
                        misses.append(Miss(_reach(text, at, row[op.column]), at, row[op.column]))
                break
            expected = op if kind is str else memory[op.var][op.column]
            if misses is not None:
                expected = expected.replace("\n", " ")
            if not text.startswith(expected, at):
                if misses is not None:
                    miss = Miss(_reach(text, at, expected), at, expected)
                    words, rule = _confusion(op, expected.count(" ")) if kind is Ref else (None, None)
                    if words and (found := words.match(text, at)):
                        goes_on = found.end(), todo, memory, paid
                        miss = miss._replace(rule=rule, end=found.end(), thread=goes_on, known=bool(found[1]))
                    misses.append(miss)
                break
            at += len(expected)
        else:
            if at == len(text):
                yield at, todo, memory, paid
            elif misses is not None:
                misses.append(Miss(at, at, "the end"))


def _reach(text, at, expected):
    """How far the text goes on as expected."""
    return at + len(os.path.commonprefix([text[at : at + len(expected)], expected]))


def _drawn(source):
    """The rows that a list, or a column of what another variable holds, may give, each with its kind."""
    var, _, column = source.partition(".")
    if not column:
        return [(row, GRAMMAR.kinds[source]) for row in GRAMMAR.lists[source]]
    at = GRAMMAR.columns.index(column)
    outer = [found for other in GRAMMAR.sources[var] for found in _drawn(other)]
    return [(option, kind) for row, kind in outer for option in row[at] or ()]


@functools.cache
def _confusion(ref, spaces):
    """What may stand for a remembered word: one of another row (group 1), or any; and what rule breaks."""
    drawn = [found for source in GRAMMAR.sources[GRAMMAR.variables[ref.var]] for found in _drawn(source)]
    words, kind = {row[ref.column] for row, _ in drawn}, drawn[0][1]
    if GRAMMAR.columns[ref.column % len(GRAMMAR.columns)] in PRONOUNS:
        kind = "pronoun"
    known = "|".join(map(re.escape, sorted(filter(None, words), key=len, reverse=True)))
    return re.compile(rf"({known})\b|\w+" + r" \w+" * spaces), f"wrong {kind}"


def _diagnose(text):
    """The first broken rule, and the miss that shows it.

    Near the point that no telling gets past, pass over one wrong word, or one rule of MUST: if the story goes
    on well behind it, that was the flaw.
    """
    misses = []
    for _ in _parse(text, [_beginning()], misses):
        return "not of the grammar", Miss(0, 0, "other line breaks")
    furthest = max(misses, key=lambda miss: miss.reach)
    if furthest.reach == len(text):
        return "unfinished", furthest
    best, flaw = (0,), None
    for miss in misses:
        if miss.thread and miss.start >= furthest.reach - 60:
            behind = []
            whole = any(True for _ in _parse(text, [miss.thread], behind))
            reach = len(text) if whole else max((after.reach for after in behind), default=0)
            merit = reach, miss.known, miss.start
            if merit > best and (whole or reach >= max(miss.end, furthest.reach) + 20):
                best, flaw = merit, miss
    return (flaw.rule, flaw) if flaw else ("not of the grammar", furthest)


# -----------------------------------------------------------------------------------------------------------


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("-n", type=int, default=1, help="how many stories to tell (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="each seed tells other stories (%(default)s)")
    parser.add_argument("--start", type=int, default=0, help="the number of the first one (%(default)s)")
    parser.add_argument(
        "--check",
        metavar="FILE",
        help="judge the stories of FILE instead, or of stdin (-): "
        "they end at lines of <|endoftext|> or of dashes, or else at blank lines",
    )
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
