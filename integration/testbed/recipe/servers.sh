# Runs inside the base: makes it crab.test/servers:latest, the agent image with servers that an agent may leave running.
set -euo pipefail
printf 'path-exclude=/usr/share/doc/*\npath-exclude=/usr/share/man/*\npath-exclude=/usr/share/locale/*\n' >/etc/dpkg/dpkg.cfg.d/agent
apt-get update -q
apt-get install -y -q --no-install-recommends bash coreutils python3 git curl tmux procps ca-certificates nginx-light redis-server \
  make tcc python3-pip python3-setuptools
# As root, workers too: where CAP_SYS_RESOURCE is missing CRIU cannot dump a process of another user.
sed -i 's/^user .*/user root;/' /etc/nginx/nginx.conf
grep -qx 'user root;' /etc/nginx/nginx.conf
rm -rf /var/lib/apt/lists/*
