#!/bin/bash
# layer.sh BASE UPPER SCRIPT keep|seed DEBS: run SCRIPT in BASE with UPPER as the writable layer.
# Runs in mount and pid namespaces of its own: whatever is mounted or started here ends here.
set -euo pipefail
main() {
  local base=$1 upper=$2 script=$3 mode=$4 debs=$5 r=$2.mnt policy
  # volatile: no sync reaches the disk, the layer is thrown away if we do not finish. The rest is switched off
  # because a layer must be readable without overlayfs (mkimage.py turns it into a tar).
  mount -t overlay overlay -o "lowerdir=$base,upperdir=$upper,workdir=$upper.work,volatile,index=off,metacopy=off,redirect_dir=off" "$r"
  mount -t proc proc "$r/proc"; mount --rbind /dev "$r/dev"; mount --make-rslave "$r/dev"
  mount -t tmpfs -o mode=755 tmpfs "$r/run"
  mkdir -p "$r/run/lock"
  mount --bind /etc/resolv.conf "$r/etc/resolv.conf"
  case $mode in
    keep) mount --bind "$debs" "$r/var/cache/apt/archives" ;;
    seed) mount -t overlay debs -o "lowerdir=$debs,upperdir=$upper.debs/upper,workdir=$upper.debs/work,volatile" "$r/var/cache/apt/archives" ;;
  esac
  # The host's CA bundle, for pip, curl and git while the layer is made; /run is a tmpfs: nothing of it stays.
  cp /etc/ssl/certs/ca-certificates.crt "$r/run/host-ca.crt"
  cp "$script" "$r/run/layer-script"
  # No service is started in a chroot. The file goes away again: installed packages should behave as on any
  # Debian afterwards.
  policy=$r/usr/sbin/policy-rc.d; printf '#!/bin/sh\nexit 101\n' >"$policy"; chmod 755 "$policy"
  env -i PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LC_ALL=C.UTF-8 \
    DEBIAN_FRONTEND=noninteractive SSL_CERT_FILE=/run/host-ca.crt PIP_CERT=/run/host-ca.crt PIP_DEFAULT_TIMEOUT=120 \
    REQUESTS_CA_BUNDLE=/run/host-ca.crt CURL_CA_BUNDLE=/run/host-ca.crt GIT_SSL_CAINFO=/run/host-ca.crt \
    chroot "$r" /bin/bash -c 'cd /root && exec bash /run/layer-script' </dev/null
  rm -f "$policy"
  # Written by every apt run, and worth nothing in a layer.
  rm -f "$r"/var/cache/apt/*.bin "$r"/var/lib/apt/lists/lock "$r"/var/log/apt/* "$r"/var/log/dpkg.log
}
main "$@"; exit
