"""Which steps are computed: inner products of full runs → schedules, by graph, search and transport, for each
payload.
"""
