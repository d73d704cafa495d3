# What this cluster is called and needs: the one file to edit before the first job. Source it, then
# submit, from the repository's root; each script sources it again on the nodes.
#
#     source cluster/settings.sh && sbatch cluster/prepare_data.sbatch --corpus wikitext-103
#
# Empty values are left to Slurm's defaults; a variable that your shell sets already stays as it is.

partition=""    # where jobs go; sinfo -s lists them
account=""      # who pays; sacctmgr show associations user=$USER lists yours
time_limit=""   # hours:minutes:seconds; a job that needs longer resumes when submitted again
modules=""      # such as "python/3.11 cuda/12.6", where Python comes from environment modules
environment=""  # folder of a virtual environment, such as .venv; empty: the python in PATH
interface=""    # network card between the nodes, such as ib0; "ip -br addr" on a node lists them

# sbatch reads these names; an empty one would be taken for a partition without a name
[ -z "$partition" ] || export SBATCH_PARTITION="$partition"
[ -z "$account" ] || export SBATCH_ACCOUNT="$account"
[ -z "$time_limit" ] || export SBATCH_TIMELIMIT="$time_limit"
[ -z "$modules" ] || module load $modules
[ -z "$environment" ] || source "$environment/bin/activate"
# The processes of a training run meet over gloo, which may choose the wrong card where a node has
# several; the processes then do not reach each other.
[ -z "$interface" ] || export GLOO_SOCKET_IFNAME="$interface"

# Prepared corpora and runs must lie where all nodes see them: data/ and out/ of this repository, or
# --data_dir. Nodes without a network: python prepare_data.py --prefetch DIR where there is one.
