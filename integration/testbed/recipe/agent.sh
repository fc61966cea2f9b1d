# Runs inside the base: makes it crab.test/agent:latest.
set -euo pipefail
printf 'path-exclude=/usr/share/doc/*\npath-exclude=/usr/share/man/*\npath-exclude=/usr/share/locale/*\n' >/etc/dpkg/dpkg.cfg.d/agent
apt-get update -q
apt-get install -y -q --no-install-recommends bash coreutils python3 git curl tmux procps ca-certificates
rm -rf /var/lib/apt/lists/*
