# SPDX-License-Identifier: Apache-2.0 OR MIT
# Machine B of demos/2b: the device host, with a network card on the way to the outside.
ip link set lo up
await 10 test -e /sys/class/net/eth0 && lease eth0 > /dev/null 2>&1 || fail "eth0 has no address"
vmsg ivshmem bind "$MESSAGES" > /dev/null || fail "cannot bind $MESSAGES"
mark machine B starts its device host
vmsg serve --bus "$BUS" --device net,id=net0,backend=user,net="$NETWORK" --device rng
