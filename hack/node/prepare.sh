# shellcheck shell=bash
# Makes what a node needs, once, below target/. Sourced by node.sh.
# Sets QEMU, KERNEL, CONSOLE, SHARED_ROOT and SHARED_TARGET.

# What is loaded before the root, what makes /dev/kvm, and what pods and their networks may need.
NODE_MODULES_ROOT=overlay,virtio_blk
NODE_MODULES_KVM="irqbypass?,kvm?,kvm_amd?"
NODE_MODULES_MORE=virtio_rng,tun,loop,erofs,vhost_net,vhost_vsock,vsock_loopback,veth,bridge,br_netfilter,\
nf_tables,nft_compat,nft_chain_nat,nft_ct,nft_masq,nft_nat,xt_MASQUERADE,xt_nat,xt_addrtype,xt_comment,xt_conntrack,\
xt_mark,xt_multiport,cls_u32,cls_matchall,act_mirred,sch_ingress

# The project's programs for the node's architecture, built if they are missing, at the places below the node's
# target/ where a build on such a machine would put them.
node_programs() {
  local triple release file
  triple=$(rust_triple "$ARCH")
  release=$TARGET/release
  [ "$ARCH" = "$(host_arch)" ] || release=$TARGET/$triple/release
  if [ ! -x "$release/containerd-shim-chsnap-v2" ] || [ ! -x "$release/chsnap" ] || [ ! -f "$TARGET/guest/$ARCH/initramfs" ]; then
    ARCH=$ARCH "$ROOT/hack/build.sh"
  fi
  [ "$SHARED_TARGET" != "$TARGET" ] || return 0
  # Not into the files, which a running node may execute.
  mkdir -p "$SHARED_TARGET/release" "$SHARED_TARGET/guest/$ARCH" "$SHARED_TARGET/image" "$SHARED_TARGET/$triple/agent"
  for file in release/containerd-shim-chsnap-v2 release/chsnap; do cp -u --remove-destination "$release/${file##*/}" "$SHARED_TARGET/$file"; done
  for file in Image vmlinux initramfs busybox; do
    [ ! -f "$TARGET/guest/$ARCH/$file" ] || cp -u --remove-destination "$TARGET/guest/$ARCH/$file" "$SHARED_TARGET/guest/$ARCH/"
  done
  cp -u --remove-destination "$TARGET/$triple/agent/chsnap-agent" "$SHARED_TARGET/$triple/agent/"
  [ ! -f "$TARGET/image-$ARCH/python.tar" ] || cp -u --remove-destination "$TARGET/image-$ARCH/python.tar" "$SHARED_TARGET/image/"
}

# shellcheck disable=SC2034 # some are for node.sh
prepare() {
  local want free
  # Images, containers and the guests' memory are written there.
  free=$(df --output=avail -BG "$TARGET" | tail -n 1 | tr -dc 0-9)
  [ "$free" -ge "${NODE_SPACE:-4}" ] || die "a node needs ${NODE_SPACE:-4} GiB below $TARGET, and there are $free"
  case $ARCH in
    amd64) QEMU=$BIN/qemu-system-x86_64 KERNEL=$TARGET/guest/amd64/vmlinux CONSOLE=ttyS0 ;;
    arm64) QEMU=$BIN/qemu-system-aarch64 KERNEL=$TARGET/guest/arm64/Image CONSOLE=ttyAMA0 ;;
  esac
  SHARED_ROOT=/ SHARED_TARGET=$TARGET
  if [ "$ARCH" != "$(host_arch)" ]; then
    SHARED_ROOT=$TARGET/node/rootfs-$ARCH SHARED_TARGET=$TARGET/node/target-$ARCH
  fi
  # What is there is taken as it is, without waiting for another run's set-up.
  if [ ! -x "$QEMU" ] || [ ! -x "$BIN/virtiofsd" ]; then
    if [ "$ARCH" = "$(host_arch)" ]; then
      "$ROOT/hack/setup.sh" packages rust qemu virtiofsd
    else
      "$ROOT/hack/setup.sh" packages rust "qemu-$ARCH" virtiofsd
    fi
  fi
  if [ "$ARCH" != "$(host_arch)" ]; then
    "$ROOT/hack/node/userland.sh" "$ARCH" "$SHARED_ROOT" "$SHARED_TARGET"
  elif [ ! -x "$TOOLS/containerd-2.1/bin/containerd" ] || [ ! -x "$BIN/runc" ]; then
    "$ROOT/hack/setup.sh" containerd
  fi
  node_programs
  [ -f "$KERNEL" ] || "$ROOT/hack/guest/build.sh" "$ARCH" kernel
  [ -x "$TARGET/guest/$ARCH/busybox" ] || "$ROOT/hack/guest/build.sh" "$ARCH" busybox
  mkdir -p "$STATE"
  want=$(digest "$ROOT/hack/node/init.sh" "$ROOT/hack/node/initramfs.py" "$ROOT/hack/guest/initramfs.py" \
    "$TARGET/guest/$ARCH/busybox" "$KERNEL" "$NODE_MODULES_ROOT $NODE_MODULES_KVM $NODE_MODULES_MORE")
  if [ ! -f "$STATE/initramfs" ] || ! stamped "node-${STATE##*/}" "$want"; then
    python3 "$ROOT/hack/node/initramfs.py" "$STATE/initramfs" "$TARGET/guest/$ARCH/busybox" "$ROOT/hack/node/init.sh" \
      "$TARGET/guest/$ARCH/modules" "root=$NODE_MODULES_ROOT" "kvm=$NODE_MODULES_KVM" "more=$NODE_MODULES_MORE"
    stamp "node-${STATE##*/}" "$want"
  fi
}
