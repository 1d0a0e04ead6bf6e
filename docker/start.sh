#!/usr/bin/env bash
# What a container of compose.yaml runs: `start.sh key|slurmdbd|slurmctld|node|store|login`.
set -euo pipefail

start_munge() {
    chown -R munge:munge /etc/munge
    mkdir -p /run/munge
    chown munge:munge /run/munge
    setpriv --reuid=munge --regid=munge --init-groups munged
}

case "${1:?expected key, slurmdbd, slurmctld, node, store or login}" in
    key) # one for all containers, in the volume that they share
        if [[ ! -s /etc/munge/munge.key ]]; then
            (umask 077 && head -c 128 /dev/urandom >/etc/munge/munge.key)
        fi
        chown -R munge:munge /etc/munge
        ;;
    slurmdbd)
        start_munge
        # slurmdbd refuses a file that others can read, which a bind mount can't promise.
        (
            umask 077
            cat >/etc/slurm/slurmdbd.conf <<CONF
AuthType=auth/munge
DbdHost=slurmdbd
SlurmUser=root
StorageType=accounting_storage/mysql
StorageHost=database
StorageLoc=slurm_acct_db
StorageUser=slurm
StoragePass=${DATABASE_PASSWORD}
CONF
        )
        exec slurmdbd -D
        ;;
    slurmctld)
        start_munge
        mkdir -p /var/spool/slurmctld
        for _ in $(seq 60); do
            sacctmgr --immediate add cluster compose && break
            sacctmgr --noheader --parsable2 list cluster | grep -q '^compose|' && break
            sleep 1
        done
        exec slurmctld -D
        ;;
    node)
        start_munge
        mkdir -p /var/spool/slurmd
        exec slurmd -D -N "$(hostname)"
        ;;
    store)
        mkdir -p /store/data
        exec rclone serve s3 --config /dev/null --addr :9000 --auth-key "${AWS_ACCESS_KEY_ID},${AWS_SECRET_ACCESS_KEY}" /store
        ;;
    login)
        start_munge
        exec sleep infinity
        ;;
    *)
        exec "$@"
        ;;
esac
