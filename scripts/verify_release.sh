#!/usr/bin/env bash
# Checks a downloaded release: the signature of SHA256SUMS, every checksum, and that no file stands beside them unlisted.
#
#   scripts/verify_release.sh dist allowed_signers [SIGNER]
#
# allowed_signers has a line `SIGNER ssh-ed25519 AAAA...` for each key that may sign (ssh-keygen(1), ALLOWED SIGNERS).
# Ends with exit code 1 if one byte differs. Sigstore bundles and provenance need a network:
#   pipx run sigstore verify github --repository OWNER/layerlens FILE
#   gh attestation verify FILE --repo OWNER/layerlens
set -euo pipefail
{ [ $# = 2 ] || [ $# = 3 ]; } || { echo "usage: verify_release.sh DIRECTORY ALLOWED_SIGNERS [SIGNER]" >&2; exit 2; }
signers=$(realpath "$2")
signer=${3:-$(awk '!/^#/ && NF {print $1; exit}' "$signers")}
cd "$1"
for needed in SHA256SUMS SHA256SUMS.sig; do
  [ -f $needed ] || { echo "error: $1 has no $needed" >&2; exit 1; }
done
ssh-keygen -Y verify -f "$signers" -I "$signer" -n layerlens-release -s SHA256SUMS.sig <SHA256SUMS >/dev/null ||
  { echo "error: SHA256SUMS is not signed by $signer" >&2; exit 1; }
sha256sum --check --quiet --strict SHA256SUMS >&2 || { echo "error: a file is not what was signed" >&2; exit 1; }
unlisted=$(find . -maxdepth 1 -type f ! -name SHA256SUMS ! -name SHA256SUMS.sig -printf '%P\n' | sort |
  comm -23 - <(sed 's/^[0-9a-f]* [ *]//' SHA256SUMS | sort))
[ -z "$unlisted" ] || { echo "error: not among the signed files: $unlisted" >&2; exit 1; }
echo "$(wc -l <SHA256SUMS) files are what $signer signed"
