# SPDX-License-Identifier: Apache-2.0 OR MIT
# Machine A of demos/2b: the proxy, and a guest of its own, whose console is this machine's.
ip link set lo up
mkdir -p /run
vmsg ivshmem bind "$MESSAGES" > /dev/null || fail "cannot bind $MESSAGES"
vmsg proxy --bus "$BUS" --front vhost-user,socket="$NET_SOCKET",dev=net0 --front vhost-user,socket="$RNG_SOCKET",dev=1 > /run/proxy.log 2>&1 &
# They are there as soon as the proxy listens.
await 60 [ -S "$NET_SOCKET" ] && await 60 [ -S "$RNG_SOCKET" ] || fail "the proxy does not listen: $(cat /run/proxy.log)"
mark machine A starts its guest
. /inner/run
