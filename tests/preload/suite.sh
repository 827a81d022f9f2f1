#!/bin/sh
# Fetches rdma-core's own tests, which Debian ships as documentation of python3-pyverbs.
#
#   suite.sh DIR     afterwards DIR/tests holds them
#
# Some systems leave documentation out when they install a package, so the package is unpacked beside them.
set -eu
dir=$1
[ -e "$dir/tests/__init__.py" ] && exit 0
mkdir -p "$dir/package"
cd "$dir/package"
apt-get download python3-pyverbs
dpkg-deb -x python3-pyverbs_*.deb .
gunzip -f usr/share/doc/rdma-core/tests/*.gz
mv usr/share/doc/rdma-core/tests "$dir/tests"
rm -rf "$dir/package"
