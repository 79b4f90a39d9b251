#!/bin/sh
# The node's first program, in its initramfs: makes a root of the host's shared directories, each
# under an overlay on the scratch disk, and hands over to agent.py in there.
# The kernel's command line says where: node.project=, node.target=, node.out=, absolute paths on the
# host, which are the same in the node.
export PATH=/bin

fail() {
  echo "chsnap-node: fatal: $*" >/dev/kmsg
  poweroff -f
}

mount -t proc proc /proc || fail "no /proc"
mount -t sysfs sysfs /sys || fail "no /sys"
mount -t devtmpfs devtmpfs /dev || fail "no /dev"
# shellcheck disable=SC2013 # words are what is wanted
for word in $(cat /proc/cmdline); do
  case $word in
    node.project=*) project=${word#*=} ;;
    node.target=*) target=${word#*=} ;;
    node.out=*) out=${word#*=} ;;
  esac
done

# Modules of one set, in an order in which insmod succeeds.
load() {
  while read -r key file; do
    [ "$key" != "$1" ] || insmod "$file" 2>/dev/null || echo "chsnap-node: $file does not load" >/dev/kmsg
  done </etc/modules.load
}

load root
mkdir -p /shared/root /shared/project /shared/target /scratch /new
mount -t ext4 -o noatime /dev/vda /scratch || fail "the scratch disk cannot be mounted"
mkdir -p /scratch/tmp /scratch/containerd /scratch/tests
chmod 1777 /scratch/tmp

# overlay <tag> <where>
overlay() {
  mount -t virtiofs -o ro "$1" "/shared/$1" || fail "the share $1 cannot be mounted"
  mkdir -p "/scratch/$1/upper" "/scratch/$1/work" "$2"
  mount -t overlay -o "lowerdir=/shared/$1,upperdir=/scratch/$1/upper,workdir=/scratch/$1/work" overlay "$2" ||
    fail "no overlay over the share $1"
}

overlay root /new
# A real file system, because overlays over overlays are not to be had. Before the project, which may be below it.
mkdir -p /new/tmp
mount --bind /scratch/tmp /new/tmp
# The root may be the host's, whose project directory may be a file system of its own.
overlay project "/new$project"
overlay target "/new$target"
mkdir -p "/new$out" "/new$target/tests"
mount -t virtiofs out "/new$out" || fail "the share out cannot be mounted"

cd /new || fail "no root"
mkdir -p proc sys dev run tmp var/lib/containerd etc
mount -t proc proc proc
mount -t sysfs sysfs sys
mount -t devtmpfs devtmpfs dev
mkdir -p dev/pts dev/shm
mount -t devpts -o gid=5,mode=620,ptmxmode=666 devpts dev/pts
mount -t tmpfs tmpfs dev/shm
mount -t tmpfs -o mode=755 tmpfs run
mkdir -p run/lock
mount --bind /scratch/containerd var/lib/containerd
mount --bind /scratch/tests "/new$target/tests"
mount -t cgroup2 cgroup2 sys/fs/cgroup || fail "no cgroup v2"
for c in cpu memory pids io; do echo "+$c" >sys/fs/cgroup/cgroup.subtree_control; done
ln -sfn /proc/self/fd dev/fd
ip link set lo up
hostname "chsnap-node-$(uname -m)" 2>/dev/null
rm -rf etc/mtab etc/resolv.conf
ln -s /proc/self/mounts etc/mtab
: >etc/resolv.conf
# Large pages make a guest's page faults fewer, each of which is dear when its host is emulated.
echo always >sys/kernel/mm/transparent_hugepage/enabled
echo always >sys/kernel/mm/transparent_hugepage/shmem_enabled
# The devices are set up, see node.sh.
for cpu in sys/devices/system/cpu/cpu[0-9]*/online; do
  { echo 1 >"$cpu"; } 2>/dev/null || echo "chsnap-node: ${cpu%/online} does not come up" >/dev/kmsg
done
load kvm
[ -e /dev/kvm ] || echo "chsnap-node: no /dev/kvm: the CPU model has no virtualisation" >/dev/kmsg
load more
umount /proc /sys /dev 2>/dev/null
# shellcheck disable=SC2093 # what follows is for when it fails
exec switch_root /new /usr/bin/python3 "$project/hack/node/agent.py" \
  "NODE_OUT=$out" "CHSNAP_TARGET=$target"
fail "no python3 in the root"
