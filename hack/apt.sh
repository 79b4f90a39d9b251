# shellcheck shell=bash
# A private apt: other suites than the machine's, without touching the machine's lists, cache or
# installed packages. Packages are verified as apt always does and unpacked below target/.
# Sourced after lib.sh.

APT=$TARGET/apt

# apt_config <suite> <arch>: prints the configuration file for it, making it when missing.
apt_config() {
  local suite=$1 arch=$2 dir=$APT/$1-$2 suites prefer=
  if [ ! -f "$dir/apt.conf" ] || [ "$ROOT/hack/apt.sh" -nt "$dir/apt.conf" ]; then
    case $suite in
      # Backports depend on packages of the release they are for, and apt takes them only if told.
      *-backports)
        suites="$suite ${suite%-backports} ${suite%-backports}-security"
        prefer="APT::Default-Release \"$suite\";"
        ;;
      sid) suites=sid ;;
      *) suites="$suite $suite-security" ;;
    esac
    mkdir -p "$dir/lists/partial" "$dir/cache/archives/partial" "$dir/empty"
    # shellcheck disable=SC2086 # a list of suites
    python3 "$ROOT/hack/apt_sources.py" $suites >"$dir/chsnap.sources.new"
    mv "$dir/chsnap.sources.new" "$dir/chsnap.sources"
    mkdir -p "$dir/sources.d"
    ln -sf ../chsnap.sources "$dir/sources.d/chsnap.sources"
    # Read after the machine's own configuration, so that its proxies and certificates hold.
    cat >"$dir/apt.conf" <<CONF
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
  fi
  # What the machine has counts as present; for a foreign architecture nothing does.
  if [ "$arch" = "$(host_arch)" ]; then
    cp /var/lib/dpkg/status "$dir/status"
  else
    : >"$dir/status"
  fi
  printf '%s\n' "$dir/apt.conf"
}

# apt_update <suite> <arch>: at most once in six hours, since the lists are only for choosing.
apt_update() {
  local conf dir=$APT/$1-$2
  [ -z "$(find "$dir/updated" -mmin -360 2>/dev/null)" ] || return 0
  conf=$(apt_config "$1" "$2")
  # apt does not wait for another apt that reads the same lists.
  exec 8>"$dir/.lock"
  flock 8
  step "apt-update-$1-$2" "reading the package lists of $1 ($2)" \
    apt-get -c "$conf" -o APT::Update::Error-Mode=any update
  touch "$dir/updated"
  exec 8>&-
}

# newest_package <suite> <arch> <regular expression>: the newest package so named in the suite.
newest_package() {
  local conf
  apt_update "$1" "$2"
  conf=$(apt_config "$1" "$2")
  apt-cache -c "$conf" pkgnames | grep -Ex -- "$3" | sort -V | tail -n 1
}

# package_version <suite> <arch> <package>
package_version() {
  apt-cache -c "$(apt_config "$1" "$2")" policy "$3" | sed -n 's/^ *Candidate: //p'
}

# download_debs <suite> <arch> <directory> alone|deps <package...>
# With `deps` also what the packages depend on and the machine lacks (or has too old).
download_debs() {
  local suite=$1 arch=$2 dir=$3 how=$4 conf
  shift 4
  apt_update "$suite" "$arch"
  conf=$(apt_config "$suite" "$arch")
  rm -rf "$dir"
  mkdir -p "$dir/partial"
  if [ "$how" = deps ]; then
    apt-get -c "$conf" -y --no-install-recommends --download-only --no-remove --reinstall \
      -o Dir::Cache::archives="$dir" install "$@"
  else
    (cd "$dir" && apt-get -c "$conf" download "$@")
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
  step "fetch-$name" "fetching $* from $suite ($arch)" \
    download_debs "$suite" "$arch" "$APT/debs/$name" "$how" "$@" ||
    die "could not fetch $* from $suite: are the machine's package sources reachable?"
  rm -rf "$dest.new"
  mkdir -p "$dest.new"
  for deb in "$APT/debs/$name"/*.deb; do
    dpkg-deb -x "$deb" "$dest.new"
    basename "$deb" >>"$dest.new/debs.txt"
  done
  rm -rf "$dest" "$APT/debs/$name"
  mv "$dest.new" "$dest"
}
