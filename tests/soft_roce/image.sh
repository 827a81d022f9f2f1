#!/usr/bin/env bash
# A small Linux guest with a soft-RoCE device, made of Debian packages and one program of ours (peer.c).
#
#   image.sh fetch DIR     downloads the current Debian kernel package into DIR (some 70 MB; kept until it changes)
#   image.sh build DIR     makes DIR/vmlinuz and DIR/initramfs.gz from it; does nothing if they are up to date
#
# Fetching wants apt-get; building wants dpkg-deb, gcc with libibverbs-dev, ibverbs-providers, busybox-static,
# kmod, cpio and iproute2. What is missing is said on stderr in one line, and the exit status is 3.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
wanted_modules=(virtio_pci virtio_net crc32_generic ib_uverbs rdma_rxe)

need() {
  local tool
  for tool in "$@"; do
    if ! command -v "${tool%%:*}" >/dev/null; then
      echo "no ${tool%%:*}: apt-get install ${tool##*:}" >&2
      exit 3
    fi
  done
}

# Debian's linux-image-amd64 is an empty package; the kernel is what it depends on.
kernel_package() {
  apt-cache depends linux-image-amd64 2>/dev/null |
    sed -n 's/^ *Depends: *\(linux-image-[0-9].*\)$/\1/p' | head -n 1
}

fetch() {
  need apt-get:apt apt-cache:apt
  cd "$1"
  local package attempt
  for attempt in known updated; do
    package=$(kernel_package)
    [[ -n $package ]] && compgen -G "${package}_*.deb" >/dev/null && return 0
    rm -f linux-image-*.deb
    [[ -n $package ]] && apt-get download -qq "$package" 2>fetch.log && return 0
    # What apt knows may be older than what its servers still have.
    [[ $attempt == known ]] && apt-get update -qq 2>>fetch.log
  done
  echo "apt-get could not download ${package:-what linux-image-amd64 depends on} (see $1/fetch.log)" >&2
  exit 3
}

# copy_program ROOT FILE PLACE: the file to its place in the guest, and the libraries it is linked with to theirs.
copy_program() {
  local library
  install -D -m 755 "$2" "$1$3"
  for library in $(ldd "$2" | sed -n 's/.*\s\(\/\S*\) (0x.*/\1/p'); do
    install -D -m 755 "$library" "$1$library"
  done
}

# Modules in the order in which they must be inserted, under short names, and a list of those names.
copy_modules() {
  local root=$1 unpacked=$2 release module path name
  release=$(ls "$unpacked/lib/modules")
  depmod -b "$unpacked" "$release"
  mkdir -p "$root/modules"
  for module in "${wanted_modules[@]}"; do
    modprobe -S "$release" -d "$unpacked" --show-depends "$module" | sed -n 's/^insmod \(\S*\).*/\1/p'
  done | awk '!seen[$0]++' | while read -r path; do
    name=$(basename "$path")
    cp "$path" "$root/modules/$name"
    echo "$name" >>"$root/modules/list"
  done
}

build() {
  need dpkg-deb:dpkg gcc:gcc busybox:busybox-static depmod:kmod modprobe:kmod cpio:cpio gzip:gzip rdma:iproute2
  local dir=$1 packages provider
  packages=("$dir"/linux-image-*.deb)
  if [[ ! -e ${packages[0]} ]]; then
    echo "no Linux kernel package in $dir: tests/soft_roce/image.sh fetch $dir" >&2
    exit 3
  fi
  if [[ $dir/initramfs.gz -nt ${packages[0]} && $dir/initramfs.gz -nt $here/peer.c &&
        $dir/initramfs.gz -nt $here/init && $dir/initramfs.gz -nt $here/image.sh ]]; then
    return 0
  fi
  provider=$(ls /usr/lib/*/libibverbs/librxe-rdmav*.so 2>/dev/null | head -n 1)
  if [[ -z $provider || ! -e /usr/include/infiniband/verbs.h ]]; then
    echo "no libibverbs with its rxe provider: apt-get install libibverbs-dev ibverbs-providers" >&2
    exit 3
  fi

  work=$(mktemp -d "$dir/work.XXXXXX")
  trap 'rm -rf "$work"' EXIT
  local root=$work/root unpacked=$work/kernel
  mkdir -p "$root"/{bin,dev,proc,sys,etc/libibverbs.d} "$unpacked"
  dpkg-deb -x "${packages[0]}" "$unpacked"
  copy_modules "$root" "$unpacked"
  gcc -O1 -Wall -Wextra -Werror -o "$work/peer" "$here/peer.c" -libverbs
  copy_program "$root" "$work/peer" /bin/peer
  copy_program "$root" "$(command -v rdma)" /bin/rdma
  copy_program "$root" "$provider" "$provider"
  install -m 755 "$(command -v busybox)" "$root/bin/busybox"
  ln -s busybox "$root/bin/sh"
  echo "driver rxe" >"$root/etc/libibverbs.d/rxe.driver"
  install -m 755 "$here/init" "$root/init"
  (cd "$root" && find . | cpio --quiet -o -H newc) | gzip -1 >"$work/initramfs.gz"
  cp "$unpacked"/boot/vmlinuz-* "$dir/vmlinuz"
  mv "$work/initramfs.gz" "$dir/initramfs.gz"
}

if [[ $# -ne 2 || ( $1 != fetch && $1 != build ) ]]; then
  sed -n '2,8s/^# \{0,1\}//p' "$0" >&2
  exit 2
fi
mkdir -p "$2"
"$1" "$(cd "$2" && pwd)"
