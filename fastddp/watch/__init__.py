"""What each process does just now, who is waited for, and why: boards, verdicts, stacks."""
