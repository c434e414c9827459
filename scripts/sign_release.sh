#!/usr/bin/env bash
# Writes SHA256SUMS of a release directory and signs it, detached, with an SSH key: SHA256SUMS.sig.
#
#   scripts/sign_release.sh dist ~/.ssh/id_ed25519
#
# The release workflow signs without keys (sigstore) as well; this signature can be checked offline, with OpenSSH alone.
set -euo pipefail
[ $# = 2 ] || { echo "usage: sign_release.sh DIRECTORY KEY" >&2; exit 2; }
[ -f "$2" ] || { echo "error: no key at $2; make one with: ssh-keygen -t ed25519 -f $2" >&2; exit 2; }
key=$(realpath "$2")
cd "$1"
rm -f SHA256SUMS SHA256SUMS.sig
files=$(find . -maxdepth 1 -type f -printf '%P\n' | sort)
[ -n "$files" ] || { echo "error: $1 is empty" >&2; exit 2; }
xargs -d '\n' sha256sum -- <<<"$files" >SHA256SUMS
ssh-keygen -Y sign -q -n layerlens-release -f "$key" SHA256SUMS
