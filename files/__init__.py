"""Files that are whole or not there, what they hold, and jobs done in parts: no process groups, no models of ours."""
