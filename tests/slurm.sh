#!/usr/bin/env bash
# A Slurm cluster of one node on this machine, without accounting, for tests: slurm.sh start | stop. As root, with Debian's slurm-wlm and munge.
set -euo pipefail

start() {
    command -v slurmctld munged > /dev/null || { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq slurm-wlm munge > /dev/null; }
    sinfo --noheader > /dev/null 2>&1 && { echo 'Slurm is running'; return; }
    [ ! -f /etc/slurm/slurm.conf ] || grep -q '^ClusterName=synthmr-test$' /etc/slurm/slurm.conf || { echo 'this machine belongs to another cluster'; exit 1; }
    mkdir -p /run/munge /var/spool/slurmctld /var/spool/slurmd /var/log/slurm
    chown munge: /run/munge
    [ -f /etc/munge/munge.key ] || /usr/sbin/mungekey --create
    pgrep -x munged > /dev/null || runuser -u munge -- /usr/sbin/munged
    cat > /etc/slurm/slurm.conf <<CONF
ClusterName=synthmr-test
SlurmctldHost=$(hostname -s)(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
AuthInfo=cred_expire=20
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
JobRequeue=1
KillWait=10
ReturnToService=2
StateSaveLocation=/var/spool/slurmctld
SlurmdSpoolDir=/var/spool/slurmd
SlurmctldLogFile=/var/log/slurm/slurmctld.log
SlurmdLogFile=/var/log/slurm/slurmd.log
NodeName=$(hostname -s) NodeAddr=127.0.0.1 CPUs=$(nproc --all) RealMemory=$(free -m | awk '/^Mem:/ {print $2}') State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
CONF
    slurmctld
    slurmd
    for _ in $(seq 60); do sinfo --noheader --format=%T 2> /dev/null | grep -q idle && { echo 'Slurm is running'; return; }; sleep 0.5; done
    sinfo; tail -5 /var/log/slurm/*.log; exit 1
}

stop() { grep -q '^ClusterName=synthmr-test$' /etc/slurm/slurm.conf && pkill -x slurmd || true; pkill -x slurmctld || true; }

"${1:-start}"
