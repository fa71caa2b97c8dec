# Sourced by the scripts beside it: packages of other Debian suites, unpacked without being installed.
# Needs apt and dpkg of a Debian 12; the mirror is whichever this machine's own apt uses.

tools=${SKIMMER_CACHE:-$HOME/.cache/skimmer}/tools
mkdir -p "$tools"

# The archive this machine takes Debian's main suite from.
debian_mirror() {
  local codename uri
  codename=$(. /etc/os-release && echo "$VERSION_CODENAME")
  uri=$(apt-get indextargets --format '$(REPO_URI) $(RELEASE)' | awk -v suite="$codename" '$2 == suite || $2 == "stable" { print $1; exit }')
  [ -n "$uri" ] || { echo "no source of $codename in apt's configuration: add one to /etc/apt/sources.list" >&2; return 1; }
  echo "$uri"
}

# apt-get with lists, state and cache of its own for one suite.
apt_of_suite() {
  local suite=$1 apt=$tools/apt-$1
  shift
  mkdir -p "$apt"/{lists/partial,cache/archives/partial,parts}
  touch "$apt/status"
  [ -s "$apt/sources.list" ] || {
    local mirror
    mirror=$(debian_mirror)
    echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $mirror $suite main" >"$apt/sources.list"
  }
  apt-get -q \
    -o Dir::Etc::SourceList="$apt/sources.list" -o Dir::Etc::SourceParts="$apt/parts" \
    -o Dir::Etc::PreferencesParts="$apt/parts" -o Dir::State="$apt" -o Dir::State::Lists="$apt/lists" \
    -o Dir::State::Status="$apt/status" -o Dir::Cache="$apt/cache" -o APT::Sandbox::User=root "$@"
}

# unpack_from_suite SUITE PACKAGE VERSION-PREFIX STAMP [PACKAGE…]: unpacks the package into <tools>/PACKAGE-<upstream
# version>, the further ones into the same folder, and writes that folder's name to STAMP.
unpack_from_suite() {
  local suite=$1 package=$2 prefix=$3 stamp=$4 work deb version target
  shift 4
  work=$(mktemp -d "$tools/.unpack-XXXXXX")
  apt_of_suite "$suite" update >&2
  (cd "$work" && apt_of_suite "$suite" download "$package" "$@" >&2)
  version=$(dpkg-deb -f "$work/${package}"_*.deb Version)
  version=${version#*:}
  version=${version%%[-~+]*}
  case $version in
    "$prefix"*) ;;
    *) echo "$suite offers $package $version, but $prefix* is wanted" >&2; rm -rf "$work"; return 1 ;;
  esac
  target=$tools/$package-$version
  for deb in "$work"/*.deb; do
    dpkg-deb -x "$deb" "$work/tree"
  done
  rm -rf "$target"
  mv "$work/tree" "$target"
  rm -rf "$work"
  echo "$target" >"$stamp"
}
