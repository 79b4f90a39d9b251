#!/usr/bin/env python3
# Stands between chsnap and a VMM, and fails where those of some hosts do.
import ctypes, fcntl, json, os, platform, re, socket, subprocess, sys, threading, time

how = json.loads("""@HOW@""")
args = sys.argv[1:]


def masked(feature):
    """Whether the machine is one without it: told to QEMU, and of Cloud Hypervisor's KVM."""
    if how["vmm"] == "qemu":
        return any(f"{feature}=off" in arg for arg in args)
    if platform.machine() != "aarch64":
        return False
    kvm = os.open("/dev/kvm", os.O_RDWR)
    check_extension, capability = 0xAE03, {"pmu": 126, "sve": 170}[feature]
    offered = fcntl.ioctl(kvm, check_extension, capability)
    os.close(kvm)
    return offered == 0


def fails():
    if how["while"]:
        return os.path.exists(how["while"])
    return not (how["unless"] and masked(how["unless"]))


def hangs():
    return how["hangs_while"] and os.path.exists(how["hangs_while"])


def works():
    os.execv(how["real"], [how["real"], *args])


def behind(replace):
    """Runs the VMM with one argument replaced; it goes with this one."""
    vmm = subprocess.Popen(
        [how["real"], *[replace.get(arg, arg) for arg in args]],
        close_fds=False,
        preexec_fn=lambda: ctypes.CDLL(None).prctl(1, 9),
    )
    threading.Thread(target=lambda: os._exit(max(vmm.wait(), 0)), daemon=True).start()


def relay(source, target):
    while data := source.recv(65536):
        target.sendall(data)
    target.shutdown(socket.SHUT_RDWR)


def between(arg):
    """What chsnap has at the other end of a QEMU's socket, and what QEMU has, which runs with that from now on."""
    outer = socket.socket(fileno=int(arg.rsplit("=", 1)[1]))
    outer.set_inheritable(False)
    inner, theirs = socket.socketpair()
    theirs.set_inheritable(True)
    behind({arg: f"{arg.rsplit('=', 1)[0]}={theirs.fileno()}"})
    theirs.close()
    threading.Thread(target=relay, args=(inner, outer), daemon=True).start()
    return outer, inner


def another_release():
    """Has the guest hear of another version of its agent's protocol: field 1 of what Info carries."""
    at = [arg for arg in args if arg.startswith("socket,id=agent,fd=")]
    if not at:
        works()
    outer, inner = between(at[0])
    while data := outer.recv(65536):
        inner.sendall(re.sub(rb"(\x04Info\x1a\x02\x08).", lambda found: found[1] + b"\x7f", data))


def qemu():
    if how["at"] == "version":
        return another_release()
    if how["at"] == "restore":
        if "-incoming" not in args or not fails():
            works()
        if hangs():
            time.sleep(1000)
        sys.exit(how["text"])
    at = [arg for arg in args if arg.startswith("socket,id=qmp,fd=")]
    if not at or not fails():
        works()
    outer, inner = between(at[0])
    for line in outer.makefile("rb"):
        order = json.loads(line)
        if order["execute"] == "migrate":
            error = {"class": "GenericError", "desc": how["text"]}
            outer.sendall(json.dumps({"id": order["id"], "error": error}).encode() + b"\n")
        else:
            inner.sendall(line)


def cloud_hypervisor():
    if "--api-socket" not in args or not fails():
        works()
    at = args[args.index("--api-socket") + 1]
    outer = socket.socket(fileno=int(at.removeprefix("fd=")))
    outer.set_inheritable(False)
    theirs = socket.socket(socket.AF_UNIX)
    theirs.bind("")  # An abstract name, which the kernel chooses.
    theirs.listen()
    theirs.set_inheritable(True)
    inner = socket.socket(socket.AF_UNIX)
    inner.connect(theirs.getsockname())
    behind({at: f"fd={theirs.fileno()}"})
    theirs.close()
    client, _ = outer.accept()
    threading.Thread(target=relay, args=(inner, client), daemon=True).start()
    refused = {"restore": b"/vm.restore ", "save": b"/vm.snapshot "}[how["at"]]
    requests = client.makefile("rb")
    while line := requests.readline():
        head, length = line, 0
        while (header := requests.readline()) not in (b"\r\n", b""):
            head += header
            if header.lower().startswith(b"content-length:"):
                length = int(header.split(b":")[1])
        request = head + b"\r\n" + requests.read(length)
        if refused not in line:
            inner.sendall(request)
        elif hangs():
            time.sleep(1000)
        else:
            said = json.dumps(["Error from API", f"The VM could not {how['at']}", how["text"]]).encode()
            status = b"HTTP/1.1 500 \r\nServer: Cloud Hypervisor API\r\nContent-Type: application/json\r\n"
            client.sendall(status + b"Content-Length: %d\r\n\r\n" % len(said) + said)


{"qemu": qemu, "cloud_hypervisor": cloud_hypervisor}[how["vmm"]]()
time.sleep(1000)  # Until the VMM ends, and this one with it.
