# shellcheck shell=bash
# A private apt: other suites than the machine's, without touching the machine's lists, cache or
# installed packages. Packages are verified as apt always does and unpacked below target/.
# Sourced after lib.sh.

APT=$TARGET/apt

# Debian's suites that stand for a release: it with what updates it.
suites_of() {
  case $1 in
    *-backports) printf '%s\n' "$1" "${1%-backports}" "${1%-backports}-security" ;;
    sid) printf '%s\n' sid ;;
    *) printf '%s\n' "$1" "$1-security" ;;
  esac
}

# apt_config <suite> <arch>: prints the configuration file for it, making it when it is missing, or
# when the machine's sources have changed, or the checkout has moved.
apt_config() {
  local suite=$1 arch=$2 dir=$APT/$1-$2 prefer='' want
  want=$(digest "$dir" "$ROOT/hack/apt.sh" "$ROOT/hack/apt_sources.py" /etc/apt/sources.list /etc/apt/sources.list.d/*)
  if [ ! -f "$dir/apt.conf" ] || [ "$(cat "$dir/inputs" 2>/dev/null)" != "$want" ]; then
    # Backports depend on packages of the release they are for, and apt takes them only if told.
    case $suite in *-backports) prefer="APT::Default-Release \"$suite\";" ;; esac
    mkdir -p "$dir/lists/partial" "$dir/cache/archives/partial" "$dir/empty" "$dir/sources.d" || return
    # shellcheck disable=SC2046 # a list of suites
    python3 "$ROOT/hack/apt_sources.py" $(suites_of "$suite") >"$dir/chsnap.sources.new" || return
    mv "$dir/chsnap.sources.new" "$dir/chsnap.sources" || return
    ln -sf ../chsnap.sources "$dir/sources.d/chsnap.sources" || return
    # Read after the machine's own configuration, so that its proxies and certificates hold.
    cat >"$dir/apt.conf" <<CONF || return
Dir::State "$dir";
Dir::State::status "$dir/status";
Dir::State::lists "$dir/lists";
Dir::Cache "$dir/cache";
Dir::Cache::pkgcache "pkgcache.bin";
Dir::Cache::srcpkgcache "";
Dir::Etc::sourcelist "/dev/null";
Dir::Etc::sourceparts "$dir/sources.d";
Dir::Etc::preferences "/dev/null";
Dir::Etc::preferencesparts "$dir/empty";
#clear APT::Update::Post-Invoke;
#clear APT::Update::Post-Invoke-Success;
#clear DPkg::Post-Invoke;
#clear APT::Architectures;
APT::Architecture "$arch";
APT::Architectures { "$arch"; };
$prefer
APT::Sandbox::User "root";
Acquire::Languages "none";
Acquire::IndexTargets::deb::DEP-11::DefaultEnabled "false";
Acquire::IndexTargets::deb::Contents-deb::DefaultEnabled "false";
Acquire::Retries "3";
CONF
    # mmdebstrap reads the new root's configuration instead of the machine's.
    apt-config dump Acquire >"$dir/acquire.conf" || return
    rm -f "$dir/updated"
    printf '%s\n' "$want" >"$dir/inputs"
  fi
  # What the machine has counts as present; for a foreign architecture nothing does.
  if [ "$arch" != "$(host_arch)" ]; then
    : >"$dir/status"
  elif [ ! -s "$dir/status" ] || [ ! "$dir/status" -nt /var/lib/dpkg/status ] || [ "$ROOT/hack/dpkg_status.py" -nt "$dir/status" ]; then
    python3 "$ROOT/hack/dpkg_status.py" /var/lib/dpkg/status "$dir/status" || return
  fi
  printf '%s\n' "$dir/apt.conf"
}

# security_note <suite> <arch>: a sentence when the machine has no security updates for the release, and
# therefore neither what only they have.
security_note() {
  local wanted
  wanted=$(suites_of "$1" | grep -- '-security$') || return 0
  if ! grep -qxF "Suites: $wanted" "$APT/$1-$2/chsnap.sources" 2>/dev/null; then
    printf '%s' "; this machine's package sources have no security archive for it: add an entry with the suite $wanted and the component main"
  fi
}

# apt_update <suite> <arch>: at most once in six hours, since the lists are only for choosing.
apt_update() {
  local conf dir=$APT/$1-$2 rc=0
  conf=$(apt_config "$1" "$2") || die "no package sources for $1 ($2) could be derived from the machine's own"
  [ -z "$(find "$dir/updated" -mmin -360 2>/dev/null)" ] || return 0
  # apt does not wait for another apt that reads the same lists.
  exec 8>"$dir/.lock"
  flock 8
  step "apt-update-$1-$2" "reading the package lists of $1 ($2)" \
    apt-get -c "$conf" -o APT::Update::Error-Mode=any update || rc=$?
  exec 8>&-
  if [ "$rc" -ne 0 ]; then
    # What was derived may depend on what could be reached.
    rm -f "$dir/inputs"
    die "the package lists of $1 could not be read: are the machine's package sources reachable, and do they have it?"
  fi
  touch "$dir/updated"
}

# download_debs <suite> <arch> <directory> alone|deps <package...>
# With `deps` also what the packages depend on and the machine lacks (or has too old).
download_debs() {
  local suite=$1 arch=$2 dir=$3 how=$4 conf
  shift 4
  # Run by step, which suspends errexit.
  conf=$(apt_config "$suite" "$arch") || return
  rm -rf "$dir" || return
  mkdir -p "$dir/partial" || return
  if [ "$how" = deps ]; then
    apt-get -c "$conf" -y --no-install-recommends --download-only --no-remove --reinstall \
      -o Dir::Cache::archives="$dir" install "$@" || return
  else
    (cd "$dir" && apt-get -c "$conf" download "$@") || return
  fi
  rm -rf "$dir/partial" "$dir/lock"
}

# fetch_debs <suite> <arch> <destination> alone|deps <package...>
# Downloads and unpacks (nothing is installed, no maintainer script runs) into <destination>,
# which appears whole or not at all. <destination>/debs.txt says what is in it.
fetch_debs() {
  local suite=$1 arch=$2 dest=$3 how=$4 name deb
  shift 4
  name=$(basename "$dest")-$arch
  apt_update "$suite" "$arch"
  step "fetch-$name" "fetching $* from $suite ($arch)" \
    download_debs "$suite" "$arch" "$APT/debs/$name" "$how" "$@" ||
    die "could not fetch $* from $suite$(security_note "$suite" "$arch")"
  rm -rf "$dest.new"
  mkdir -p "$dest.new"
  for deb in "$APT/debs/$name"/*.deb; do
    dpkg-deb -x "$deb" "$dest.new" || die "could not unpack $deb"
    basename "$deb" >>"$dest.new/debs.txt"
  done
  rm -rf "$dest" "$APT/debs/$name"
  mv "$dest.new" "$dest"
}
