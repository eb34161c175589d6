#!/bin/sh
# SPDX-License-Identifier: Apache-2.0 OR MIT
# Called by udhcpc with the event as argument and the lease in variables.
case $1 in
deconfig)
    ip -4 addr flush dev "$interface"
    ;;
bound | renew)
    ip addr add "$ip/${mask:-24}" dev "$interface"
    for via in $router; do
        ip route add default via "$via" dev "$interface"
        break
    done
    : > /etc/resolv.conf
    for server in $dns; do
        echo "nameserver $server" >> /etc/resolv.conf
    done
    echo "lease $interface $ip/${mask:-24} router ${router:-none} dns ${dns:-none} time ${lease:-0}" > "/tmp/lease.$interface"
    ;;
esac
