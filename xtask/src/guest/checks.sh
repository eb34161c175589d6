# SPDX-License-Identifier: Apache-2.0 OR MIT
# Many checks of an ordinary network and an ordinary entropy device in one boot, with exercises.sh.
check net-driver is "$(basename "$(readlink "$device/driver")")" virtio_net
check net-transport holds "$device" "$TRANSPORT"
check net-address is "$(cat /sys/class/net/eth1/address)" "$TEST_MAC"
check net-version-1 feature "$device" 32
check net-up ip link set eth1 up
check net-carrier await 10 grep -q 1 /sys/class/net/eth1/carrier
check dhcp lease eth1
check dhcp-address is "$(address_of eth1)" 10.0.2.15
check dhcp-router holds "$(ip route)" 'default via 10.0.2.2 dev eth1'
check dhcp-dns holds "$(cat /tmp/lease.eth1)" 'dns 10.0.2.3'
check ping ping -q -c 5 -i 0.1 10.0.2.2
check ping-large ping -q -c 3 -i 0.1 -s 1400 10.0.2.2
check ping-burst ping -q -A -c 300 10.0.2.2
check http fetch /tmp/file
check http-many fetch_many
check http-refused refused
check upload-short upload 1
check upload-long upload 4194304
check udp fetch_udp
check rng-driver holds "$(cat /sys/class/misc/hw_random/rng_current)" virtio_rng
check rng random 64
check link-down-and-up down_and_up
check driver-again again
check http-again fetch /tmp/file
check rng-driver-again rng_again
check kernel-log clean_log
