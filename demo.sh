#!/bin/sh
# FedAvg against FedSparse on Fashion-MNIST, or on scikit-learn's digits where Fashion-MNIST cannot be had.
set -eu
bin=$1
out=$2
rm -rf "$out"
if "$bin/fedprior" data --quiet fashion-mnist; then
    dataset=fashion-mnist
elif command -v apt-get >/dev/null && [ "$(id -u)" = 0 ] && apt-get update -qq && apt-get install -y -qq dataset-fashion-mnist; then
    dataset=fashion-mnist
else
    echo "Fashion-MNIST is not here (fedprior data tells how to get it): the demo takes the digits."
    dataset=digits
fi
