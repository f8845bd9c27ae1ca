# Operate a TPU VM through gcloud. Every value is a parameter; none defaults to an account's:
#
#   make tpu-status TPU=name PROJECT=id ZONE=zone
#   make tpu-run TPU=name PROJECT=id ZONE=zone HOSTKEY=SHA256:... EXPERIMENT=qwen25_3b_bigkv
#
# The parameters are documented in docs/guide/tpu.md. DRY_RUN=1 prints the commands and runs none.

TPU_VALUES := TPU PROJECT ZONE HOSTKEY WORKER SSH_SUITE VM_DIR REF REMOTE REPO ENGINE EXPERIMENT \
	ARGS RUN TAIL FOLLOW TO COMMAND DRY_RUN

# Take the values literally: make would otherwise expand a $ in them.
$(foreach name,$(TPU_VALUES),$(eval tpu-%: override export $(name) := $$(value $(name))))

.PHONY: tpu-status tpu-ssh tpu-sync tpu-setup tpu-secrets tpu-doctor tpu-run tpu-logs tpu-fetch

tpu-status: ## say whether the TPU VM is READY, or what it is
	@ops/tpu status

tpu-ssh: ## a shell on the TPU VM, or COMMAND='...'
	@ops/tpu ssh

tpu-sync: ## put the VM's clone at REF, a pushed branch or tag
	@ops/tpu sync

tpu-setup: ## make the environment on the VM; ENGINE=bd09a87 takes the engine from git
	@ops/tpu setup

tpu-secrets: ## write the VM's .env from standard input: make tpu-secrets ... <.env
	@ops/tpu secrets

tpu-doctor: ## look for what would fail a run on the VM
	@ops/tpu doctor

tpu-run: ## start a run that outlives the connection: make tpu-run ... EXPERIMENT=tiny
	@ops/tpu run

tpu-logs: ## the log of the last run, or of RUN; FOLLOW=1 waits for its end
	@ops/tpu logs

tpu-fetch: ## copy the directory of the last run, or of RUN, to TO
	@ops/tpu fetch
