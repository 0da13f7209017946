#!/usr/bin/env bash
# install_nsys.sh TARGET
# Puts Nsight Systems 2023.4 under TARGET (TARGET/target-linux-x64/nsys), from the packages
# of Debian trixie, which also run on bookworm. The system's package sources stay as they
# are; only libssh-4 is installed, where it is missing and we may. TARGET appears only
# when it is complete.
set -euo pipefail
target=${1:?usage: install_nsys.sh TARGET}
release=trixie

fail() { echo "install_nsys.sh: $*" >&2; exit 1; }
command -v apt-get >/dev/null && command -v dpkg-deb >/dev/null || fail "this is not a Debian system"

# The mirror that this machine already uses, from either format of sources file.
mirror=$(cat /etc/apt/sources.list /etc/apt/sources.list.d/*.{list,sources} 2>/dev/null \
    | grep -v '^ *#' | grep -oE '[a-z+]+:/[^ ]*/debian/?( |$)' | head -n 1 | tr -d ' ') || true
[ -n "$mirror" ] || fail "no Debian mirror in the package sources"

work=$(mktemp -d)
partial=$target.partial.$$
trap 'rm -rf "$work" "$partial"' EXIT
chmod 755 "$work"  # apt downloads as a user of its own
mkdir -p "$work/lists/partial" "$work/packages"
keyring=/usr/share/keyrings/debian-archive-keyring.gpg

apt_here() {
    apt-get -qq -o Dir::Etc::SourceList="$work/sources.list" -o Dir::Etc::SourceParts=/dev/null \
        -o Dir::State::Lists="$work/lists" -o APT::Sandbox::User=root "$@"
}
echo "deb [signed-by=$keyring] $mirror $release main contrib non-free" >"$work/sources.list"
if ! apt_here update; then
    # An older bookworm does not have the key of trixie yet.
    { apt-get -qq update && apt-get -qq install -y debian-archive-keyring >/dev/null; } || true
    apt_here update || fail "the lists of $release could not be read from the machine's mirror"
fi
(cd "$work/packages" && apt_here download nsight-systems nsight-systems-target)
for package in "$work"/packages/*.deb; do dpkg-deb -x "$package" "$work/unpacked"; done

# nsys looks for its two halves side by side.
mkdir -p "$partial"
mv "$work/unpacked/usr/lib/nsight-systems/host-linux-x64" "$partial/"
mv "$work"/unpacked/usr/lib/*/nsight-systems/target-linux-x64 "$partial/"

# The importer loads libssh from its own folder; without it every report stays a .qdstrm.
find_libssh() { ldconfig -p | awk '/libssh\.so\.4 / && !path {path = $NF} END {print path}'; }
libssh=$(find_libssh)
if [ -z "$libssh" ]; then
    apt-get -qq update && apt-get -qq install -y --no-install-recommends libssh-4 >/dev/null \
        || fail "libssh-4 is missing and cannot be installed"
    libssh=$(find_libssh)
fi
ln -sf "$libssh" "$partial/host-linux-x64/libssh.so"
ln -sf "$libssh" "$partial/host-linux-x64/libssh.so.4"

"$partial/host-linux-x64/QdstrmImporter" --version >/dev/null || fail "the importer does not run"
"$partial/target-linux-x64/nsys" --version
mkdir -p "$(dirname "$target")"
mv -T "$partial" "$target"
