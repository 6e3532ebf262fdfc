"""The device side of ADB on 127.0.0.1, spoken to by a real ADB server.

What is imitated: the transport protocol over TCP (version 0x01000001, one unacknowledged message per stream), the services
shell (v1 and v2, raw and with a terminal), exec, sync (version 1, and stat and list of version 2), tcp, reverse, reboot, and the
refusals of root, remount and tcpip; adbd's manners where they matter: a failed push is told at once and swallowed to its end, a
lost shell sends SIGHUP to the program that it started and to nothing else.

What is not: pairing and TLS, keys (a device that refuses keys is a fault, "unauthorized"), USB, compressed sync, delayed
acknowledgments, toybox and mksh (the host's own tools and sh answer), SELinux, a processor of another kind: programs run on the host's.

The wire format is documented in the Android sources: ``packages/modules/adb/protocol.txt``, ``SERVICES.TXT``, ``SYNC.TXT`` and
``shell_protocol.h``.
"""
