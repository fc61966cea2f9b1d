#!/bin/bash
# Prepares the environment of trace crab-h11-chunked. Run as root inside a fresh Debian 13 (trixie) minbase root
# with network access to apt and PyPI; afterwards the trace replays without any network.
set -eu
export DEBIAN_FRONTEND=noninteractive PIP_BREAK_SYSTEM_PACKAGES=1 PIP_ROOT_USER_ACTION=ignore PIP_DISABLE_PIP_VERSION_CHECK=1
# Light: no documentation, and not the 45 MB of Perl modules that git brings along for send-email and the like.
printf 'path-exclude=%s/*\n' /usr/share/doc /usr/share/man /usr/share/locale /usr/share/perl /usr/lib/x86_64-linux-gnu/perl \
  > /etc/dpkg/dpkg.cfg.d/light
apt-get update -q
apt-get install -y -q --no-install-recommends python3 python3-pip python-is-python3 git ca-certificates
git config --global user.name agent; git config --global user.email agent@localhost
git config --global init.defaultBranch main; git config --global safe.directory '*'
# what the agent itself installs in the trace, offline
mkdir -p /opt/wheels
pip download -q --no-deps -d /opt/wheels 'pytest==8.3.5' 'iniconfig==2.1.0' 'pluggy==1.6.0' 'packaging==25.0'
# The sdist with the bug, on top of the one before it, so that `git log` and `git blame` have something to say.
# pip asks the sdists for their metadata, which wants a setuptools; it does not stay.
pip install -q --no-compile --target /tmp/setuptools 'setuptools==80.9.0'
git init -q /testbed; cd /testbed
printf '%s\n' '__pycache__/' '*.pyc' '*.egg-info/' '.pytest_cache/' 'build/' > .git/info/exclude
release() { # VERSION DATE
  PYTHONPATH=/tmp/setuptools pip download -q --no-deps --no-build-isolation --no-binary :all: -d "/tmp/sdist-$1" "h11==$1"
  git rm -q -r --ignore-unmatch .
  tar -xf "/tmp/sdist-$1/"*.tar.gz -C /testbed --strip-components=1 --no-same-owner
  rm -rf h11.egg-info; git add -A
  GIT_AUTHOR_DATE=$2 GIT_COMMITTER_DATE=$2 git -c gc.auto=0 -c maintenance.auto=false commit -q -m "Release $1"
  git tag "v$1"
}
release 0.13.0 2022-01-19T20:00:00Z
release 0.14.0 2022-09-25T15:00:00Z
git gc -q
# pip works offline from here on (wheels in /opt/wheels)
printf '[global]\nno-index = true\nfind-links = /opt/wheels\nbreak-system-packages = true\nroot-user-action = ignore\ndisable-pip-version-check = true\n' > /etc/pip.conf
git status --porcelain | head -5
apt-get clean; rm -rf /root/.cache /tmp/* /var/lib/apt/lists/*
