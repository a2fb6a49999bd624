"""The files whose tests share the servers of the fixtures `plain` and `sere`, in one worker."""

SHARE_SERVERS = ("test_serving.py", "test_without_flag.py", "test_served_cost.py")
