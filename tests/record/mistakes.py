"""What a user can get wrong: each line has one error, or does what it says."""

LINES = """
    influence rnak 17
    influence rank
    influence rank 17 --tpo 3
    influence rank 17 --top 0
    influence rank 17 --top many
    influence rank 99999
    influence rank 30:20
    influence rank nowhere.png
    influence rank influence.yaml
    influence rank test
    influence rank 17 --train 3
    influence rank --train 99999
    influence rank 17 --target Shoe
    influence rank 17 --format xml
    influence rank 17 -o nowhere/out.csv
    influence rank 17 --report nowhere/out.html
    influence rank 17 -o out.xml
    influence rank 17 -o same.html --report same.html
    influence rank 17 --format parquet
    influence rank 17 --plot why.bmp
    influence rank 17 --normalise none-such
    influence rank 17 --normalise relatif --damping-sweep
    influence rank 17 --attribution saliency
    influence rank 17 --attribution none-such --report a.html
    influence rank 17 --on-the-fly --damping-sweep
    influence rank --train 3 --aggregate
    influence rank 17 -c missing.yaml
    influence rank 17 -s curvatur.damping=1
    influence rank 17 -s curvature.dampng=1
    influence rank 17 -s curvature.damping=-1
    influence rank 17 -s curvature.damping
    influence rank 17 -s curvature.method=ekfca
    influence rank 17 -s gradients.layers='["77"]'
    influence rank 17 -s model.checkpoint=missing.pt
    influence rank 17 -s model.checkpoint=influence.yaml
    influence rank 17 -s model.factory=./model.py:biuld
    influence rank 17 -s model.factory=torchvision.models.resnet18
    influence rank 17 -s train.dataset=torchvision.datasets.ImagFolder
    influence rank 17 -s 'train.args={rooot: train}'
    influence rank 17 -s 'train.args={root: nowhere}'
    influence rank 17 -s 'train.transform=[ToImgae]'
    influence rank 17 -s 'train.transform=[ToImage]'
    influence rank 17 -s loss=hinge
    influence rank 17 -s loss=crossentropy
    influence rank 17 -s device=cuda:9
    influence rank 17 --precision float8
    influence rank 17 --precision bf16
    printf '17\\nnothing\\n' | influence rank -
    influence rank - < /dev/null
    printf 'l2: [1\\n' > broken.yaml; influence check -c broken.yaml
    printf 'model: 3\\nmodel: 4\\n' > twice.yaml; influence check -c twice.yaml
    printf '' > empty.yaml; influence check -c empty.yaml
    sed 's/l2: 1e-3/l2: lots/' influence.yaml > lots.yaml; influence check -c lots.yaml
    printf 'raise ValueError("no model")\\n' > raising.py; influence check -s model.factory=./raising.py:build
    printf 'def build(:\\n' > syntax.py; influence check -s model.factory=./syntax.py:build
    head -c 500 model.pt > short.pt; influence check -s model.checkpoint=short.pt
    influence mislabels --signal none-such
    influence mislabels --on validation
    influence mislabels --top 0
    influence mislabels --top some
    influence mislabels --explain 99999
    influence mislabels --explain 17 --format cleanlab
    influence mislabels --explain 17 --plot a.png
    influence mislabels --on test --damping-sweep
    influence mislabels --truth missing.csv
    influence mislabels --truth influence.yaml
    influence mislabels --fail-above -1
    printf 'index,label\\n3,Shoe\\n' > wrong.csv; influence mislabels -s train.labels=wrong.csv
    printf 'index\\n99999\\n' > beyond.csv; influence mislabels -s train.exclude=beyond.csv
    influence groups --of Shoe
    influence groups --by suggested
    influence groups --metadata everything.csv --by none_such
    influence groups --metadata missing.csv --by a
    head -20 everything.csv > part.csv; influence groups --metadata part.csv --by suggested
    influence groups --top 0
    influence compare one.csv
    influence compare one.csv missing.csv
    influence compare one.csv everything.csv
    influence compare one.csv influence.yaml
    influence compare one.csv other.csv --report c.html -o c.html
    influence compare everything.csv loss.csv --distance
    influence verify --loo 0
    influence verify --loo 2 --lds
    influence verify 17 --lds
    influence verify 17 --plot a.png
    influence verify --methods ekfac
    influence verify --lds --same-run
    influence verify --top 200%
    influence verify --top 1% --lds
    influence verify --measure margin
    influence verify --drop 5%
    influence verify --lds --methods ekfac,ekfac
    influence verify --lds --methods none-such
    influence verify --lds -s training=null
    influence verify --lds -s training.factory=./model.py:trian
    influence select
    influence select --keep 2
    influence select --keep 0.5 --by age
    influence select --keep 0.5 --exclude a.txt
    influence perturb
    influence perturb 12
    influence perturb 99999 --test 17
    influence perturb 12 --test 99999
    influence perturb 12 --test 17 --delta missing.npy
    influence perturb 12 --test 17 --black 0
    influence perturb 12 --test 17 --pixel-step none
    influence perturb --attack --attackable --test 1
    influence perturb --attack --test 1 --to train
    influence perturb 12 --test 17 --map a.txt
    influence gradients --fsck --repair
    influence gradients --format csv
    influence relabel
    influence relabel missing.csv
    influence relabel influence.yaml
    influence relabel --undo
    influence relabel decisions.csv --undo --force
    influence relabel decisions.csv --on validation
    influence init influence.yaml
"""
