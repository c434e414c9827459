#!/usr/bin/env bash
# Sourced by check_wheel.sh and check_image_steps.sh: a minimal Debian root that has Python and nothing else.
#
#   source scripts/debian_root.sh && make_debian_root DIRECTORY && ... && unmount_debian_root DIRECTORY
#
# What debootstrap fetched is kept in build/, so that the next root takes seconds. Needs root, debootstrap and a mirror.

debian_suite=bookworm # its Python is 3.11

make_debian_root() {
  local root=$1 kept=build/debian-root-$debian_suite.tar
  [ "$(id -u)" = 0 ] || { echo "error: chroot needs root" >&2; return 2; }
  if [ ! -f "$kept" ]; then
    command -v debootstrap >/dev/null || { echo "error: no debootstrap; apt-get install debootstrap" >&2; return 2; }
    local fresh log
    fresh=$(mktemp -d) log=$(mktemp)
    debootstrap --variant=minbase --include=python3,python3-venv,ca-certificates "$debian_suite" "$fresh" >"$log" 2>&1 ||
      { tail -n 5 "$log" >&2; rm -rf "$fresh" "$log"; return 1; }
    rm -rf "$fresh"/var/cache/apt/archives/*.deb "$log"
    tar -C "$fresh" -cf "$kept.part" . && mv "$kept.part" "$kept"
    rm -rf "$fresh"
  fi
  mkdir -p "$root"
  tar -C "$root" -xf "$kept"
  mount -t proc proc "$root/proc"
}

unmount_debian_root() {
  awk -v root="$1/" 'index($2, root) == 1 {print $2}' /proc/mounts | sort -r | xargs -r -n 1 umount
}
