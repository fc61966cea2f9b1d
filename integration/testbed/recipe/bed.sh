# Runs inside the base: makes it the bed. What changes here makes a new bed (build hashes this file).
set -euo pipefail
cat >/etc/dpkg/dpkg.cfg.d/crab-bed <<'EOF'
force-unsafe-io
path-exclude=/usr/share/doc/*
path-exclude=/usr/share/man/*
path-exclude=/usr/share/locale/*
path-exclude=/usr/share/info/*
EOF
# Testing gives CRIU 4.2 (Debian 13's 4.1.1 cannot dump inet sockets on kernel 6.18) and what CRIU needs of it.
# Priority 100: testing is never preferred for anything else.
# check-valid-until: mirrors may lag behind testing's short validity.
echo 'deb [check-valid-until=no] http://deb.debian.org/debian forky main' >/etc/apt/sources.list.d/forky.list
cat >/etc/apt/preferences.d/criu <<'EOF'
Package: *
Pin: release n=forky
Pin-Priority: 100

Package: criu libcompel1 libcriu2 libnl-3-200
Pin: release n=forky
Pin-Priority: 990
EOF
echo 'Acquire::Languages "none";' >/etc/apt/apt.conf.d/90crab-bed
apt-get update -q
# libcriu2: crun loads it, and without it neither dumps nor restores.
apt-get install -y -q --no-install-recommends \
  containerd runc crun docker.io docker-cli criu libcriu2 \
  iproute2 iptables procps util-linux e2fsprogs xfsprogs btrfs-progs libelf1t64 \
  python3 python3-pytest python3-pyfuse3 jq strace ca-certificates attr acl socat
printf '[safe]\n\tdirectory = *\n' >/etc/gitconfig
mkdir -p /src /traces /var/lib/crab /var/lib/containerd /var/lib/docker /var/log/bed
criu=$(dpkg-query -Wf '${Version}' criu)
dpkg --compare-versions "$criu" ge 4.2 || { echo "CRIU is $criu, not 4.2 or newer" >&2; exit 1; }
rm -rf /var/lib/apt/lists/*
