# Runs inside the base: makes it crab.test/database:latest, with a PostgreSQL whose processes are its own user's.
set -euo pipefail
printf 'path-exclude=/usr/share/doc/*\npath-exclude=/usr/share/man/*\npath-exclude=/usr/share/locale/*\n' >/etc/dpkg/dpkg.cfg.d/agent
printf '#!/bin/sh\nexit 101\n' >/usr/sbin/policy-rc.d
chmod +x /usr/sbin/policy-rc.d
apt-get update -q
apt-get install -y -q --no-install-recommends bash coreutils procps postgresql
rm -rf /var/lib/apt/lists/* /usr/sbin/policy-rc.d
test -s /var/lib/postgresql/17/main/PG_VERSION
