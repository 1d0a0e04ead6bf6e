#!/usr/bin/env bash
# Installs what some tests need beside Python's packages. By npm, where it is, into ~/.cache: Azurite, an emulator of
# Azure's store. Debian's packages: a real Slurm with accounting, a browser for the report's pages, Fashion-MNIST; as
# root on Debian or Ubuntu. Elsewhere it says so and succeeds, and those tests skip with their reason.
# Every step has a time limit. No service of these packages is started: the tests start their own, on loopback.
set -euo pipefail
cd "$(dirname "$0")/.."

azurite="${XDG_CACHE_HOME:-$HOME/.cache}/dist_ssl-tests/azurite-$(sed -n 's/^AZURITE = "\(.*\)"$/\1/p' tests/clouds.py)"
if [[ ! -x "$azurite/node_modules/.bin/azurite-blob" ]]; then
    if timeout 600 npm install --prefix "$azurite" --no-audit --no-fund --silent "azurite@${azurite##*-}"; then
        echo "tests/system.sh: installed Azurite"
    else
        echo "tests/system.sh: Azurite not installed (needs npm); the tests that use it will skip" >&2
    fi
fi

packages=(slurm-wlm slurmdbd munge mariadb-server chromium dataset-fashion-mnist)
missing=()
for package in "${packages[@]}"; do
    if [[ "$(dpkg-query --show --showformat='${db:Status-Status}' "$package" 2>/dev/null)" != installed ]]; then
        missing+=("$package")
    fi
done
if [[ ${#missing[@]} -eq 0 ]]; then
    exit 0
fi
if ! command -v apt-get >/dev/null || [[ "$(id -u)" != 0 ]]; then
    echo "tests/system.sh: ${missing[*]} not installed (needs apt-get and root); the tests that use them will skip" >&2
    exit 0
fi

# Maintainer scripts ask this file whether they may start a service: 101 means no.
if [[ ! -e /usr/sbin/policy-rc.d ]]; then
    printf '#!/bin/sh\nexit 101\n' >/usr/sbin/policy-rc.d
    chmod 755 /usr/sbin/policy-rc.d
    trap 'rm -f /usr/sbin/policy-rc.d' EXIT
fi
export DEBIAN_FRONTEND=noninteractive
lock_wait=(-o DPkg::Lock::Timeout=120)
timeout 180 apt-get "${lock_wait[@]}" update -qq
timeout 900 apt-get "${lock_wait[@]}" install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
echo "tests/system.sh: installed ${missing[*]}"
