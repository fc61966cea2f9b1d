# shellcheck shell=bash
# What the host must have before a bed can be built: a fresh Debian 12 or 13 gets it by apt.

host_tools() {
  local want=() apt=0
  have() { command -v "$1" >/dev/null; }
  have debootstrap || want+=(debootstrap debian-archive-keyring)
  have python3     || want+=(python3)
  have unshare     || want+=(util-linux)
  have mount       || want+=(mount)
  have losetup     || want+=(mount)
  [ -e /etc/ssl/certs/ca-certificates.crt ] || want+=(ca-certificates)
  [ ${#want[@]} -gt 0 ] || return 0
  say "installing on the host: ${want[*]}"
  for apt in 1 2; do
    # Only a host whose package lists are missing or too old pays for `apt-get update`.
    DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends "${want[@]}" >&2 && return 0
    [ "$apt" = 2 ] || apt-get update -q >&2
  done
  die "cannot install ${want[*]}"
}
