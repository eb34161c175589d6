# SPDX-License-Identifier: Apache-2.0 OR MIT
# A network device whose link is down when its driver starts, and up later.
name_nic "$OWN_MAC" eth0 || fail "no network device with the address $OWN_MAC"
name_nic "$TEST_MAC" eth1 || fail "no network device with the address $TEST_MAC"
ip link set eth0 down
carrier() { [ "$(cat /sys/class/net/eth1/carrier 2> /dev/null)" = "$1" ]; }
ip link set eth1 up
check down await 20 carrier 0
# The same driver again, which finds no back end.
driver=/sys/bus/virtio/drivers/virtio_net
virtio=$(basename "$(readlink -f /sys/class/net/eth1/device)")
echo "$virtio" > $driver/unbind
echo "$virtio" > $driver/bind
check bound-again await 10 name_nic "$TEST_MAC" eth1
ip link set eth1 up
check still-down await 20 carrier 0
mark link-up
check up await 20 carrier 1
check dhcp lease eth1
check ping ping -q -c 3 -i 0.2 10.0.2.2
