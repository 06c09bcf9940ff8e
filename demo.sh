#!/bin/sh
# FedAvg against FedSparse on Fashion-MNIST, or on scikit-learn's digits where Fashion-MNIST cannot be had.
# Usage: demo.sh BIN OUT; BIN is the folder of the environment's programs.
set -eu
bin=$1
out=$2
have() { "$bin/python" -c "import sys; from fedprior.data import available; sys.exit(not any(s.name == '$1' and s.found for s in available()))"; }

rm -rf "$out"
if ! have fashion-mnist && command -v apt-get >/dev/null && [ "$(id -u)" = 0 ]; then
    echo "Installing the package dataset-fashion-mnist"
    (apt-get update -qq && apt-get install -y -qq dataset-fashion-mnist) >/dev/null || true
fi
if have fashion-mnist; then
    exec "$bin/fedprior" compare fashion-mnist --algorithms fedavg,fedsparse --rounds 25 --clients 100 --cohort 10 \
        --alpha 1.0 --lr 0.2 --seed 0 --evaluate-every 5 --threads 2 --out "$out"
fi
echo "Fashion-MNIST is not here ('fedprior data' tells how to get it): the demo takes the digits."
exec "$bin/fedprior" compare digits --algorithms fedavg,fedsparse --rounds 60 --clients 20 --cohort 10 \
    --alpha 1.0 --lr 0.1 --seed 0 --evaluate-every 3 --out "$out"
