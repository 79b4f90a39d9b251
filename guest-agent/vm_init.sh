#!/bin/sh
# The guest's /init: makes the kernel's file systems and the virtiofs root available, then becomes
# the agent. Runs under busybox from the initramfs. Kept to few processes, for each costs
# milliseconds in an emulated guest.
#
# A step that fails puts one line "chsnap-init: fatal: <step>: <what>" on the console and powers
# the VM off, so that the host reads the reason instead of waiting for its deadline.

export PATH=/bin:/sbin

fatal() {
  # Through the kernel's log, because that reaches the serial port before power-off; the plain
  # console is for the time before /dev is mounted.
  line="chsnap-init: fatal: $1: $2"
  { echo "<0>$line" >/dev/kmsg; } 2>/dev/null || echo "$line"
  poweroff -f
  # The caller (pid 1) must never go on.
  exec sleep 1000000
}

# try <step> <command...>: the first line of its error output is the reason that is reported.
# A file and not $(...), which would cost a process.
try() {
  step=$1
  shift
  "$@" 2>/run/error || {
    read -r reason </run/error
    fatal "$step" "${reason:-$* failed}"
  }
}

try dev mount -t devtmpfs -o nosuid,mode=0755 devtmpfs /dev
try dev mkdir /dev/pts /dev/shm
try mount mount -a

# The agent limits and measures containers with these; a kernel may lack some.
read -r controllers </sys/fs/cgroup/cgroup.controllers
enable=
for c in cpu memory pids io; do
  case " $controllers " in
    *" $c "*) enable="$enable+$c " ;;
  esac
done
echo "$enable" >/sys/fs/cgroup/cgroup.subtree_control || fatal cgroup "cannot enable the controllers $enable"

# With huge pages the kernel sets 45 MiB of 1 GiB aside, which the host has counted as the container's.
echo 4096 >/proc/sys/vm/min_free_kbytes

# Modules are listed with what they are for: the id of a virtio device that must be there, or a
# word in chsnap.modules= on the kernel command line.
wanted=
share=now
for device in /sys/bus/virtio/devices/*/modalias; do
  if read -r alias 2>/dev/null <"$device"; then
    alias=${alias#virtio:}
    wanted="$wanted${alias%v*},"
  fi
done
read -r cmdline </proc/cmdline
for option in $cmdline; do
  case $option in
    chsnap.modules=*) wanted="$wanted${option#*=}," ;;
    # The guest of a template: the agent mounts it when it is told to, in the restored machine.
    chsnap.share=later) share=later ;;
  esac
done
while read -r key module; do
  case ",$wanted" in
    *",$key,"*)
      # A module that two keys need is listed twice.
      name=${module##*/}
      [ -d "/sys/module/${name%.ko}" ] || try module insmod "$module"
      ;;
  esac
done </etc/modules.load

try loopback ip link set lo up
[ "$share" = later ] || try share mount -t virtiofs -o nodev,relatime chsnap /run/chsnap/share

# A shell whose exec fails ends, and with it the guest, without a word of the cause.
[ -x /sbin/chsnap-agent ] || fatal agent "there is no program /sbin/chsnap-agent"
exec /sbin/chsnap-agent
