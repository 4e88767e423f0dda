"""Write docs/faults.md: what can go wrong, what happens then, and how many tries the tests make of it.

python tools/build_docs_faults.py

The tries of a test are the rows of its parameter lists, counted in its source.
"""

from __future__ import annotations

import ast
import importlib
import math
from pathlib import Path
from typing import NamedTuple

REPOSITORY = Path(__file__).resolve().parents[1]
PAGE = REPOSITORY / "docs" / "faults.md"


class Fault(NamedTuple):
    """A row of the page: the fault, what the package does, and the tests, ``file below tests: names``."""

    what: str
    outcome: str
    tests: dict[str, list[str]]


FAULTS: dict[str, list[Fault]] = {
    "Numbers": [
        Fault(
            "positions, charges, boxes that are not finite, or atoms that all but coincide (at the very same place "
            "they do not see each other: a warning of `torchmd-train` and `eval`, refused by `md`, `relax`, `vib`, "
            "`scan`, `label`)",
            "refused with the atom or system, in data files with the frame; where values are not looked at, that "
            "system alone is NaN",
            {
                "test_unsound.py": [
                    "test_positions_that_are_not_finite_are_refused_by_atom",
                    "test_where_values_are_not_looked_at_such_a_system_is_nan_and_no_other",
                    "test_vectors_of_edges_that_are_not_finite_are_refused",
                    "test_total_charges_and_spins_that_are_not_finite_are_refused_by_system",
                    "test_what_was_compiled_returns_nan_for_that_system_alone",
                    "test_what_is_exported_returns_nan_for_that_system_alone",
                    "test_boxes_that_are_not_finite_are_refused",
                    "test_calculators_refuse_positions_that_are_not_finite_and_go_on_afterwards",
                    "test_atoms_that_all_but_coincide_are_refused",
                ]
            },
        ),
        Fault(
            "labels that are not finite",
            "refused with the file and the frame",
            {
                "datasets/test_ase.py": ["test_numbers_that_are_not_finite_are_refused"],
                "datasets/test_structure_tables.py": ["test_numbers_that_are_not_finite_are_refused_by_frame"],
            },
        ),
        Fault(
            "a loss or weights that are not numbers",
            "the run ends with advice; earlier checkpoints stay good",
            {
                "training/test_run.py": [
                    "test_a_loss_that_is_not_a_number_ends_the_run_with_advice",
                    "test_weights_that_are_lost_are_not_saved_and_end_the_run",
                ]
            },
        ),
        Fault(
            "a calculation beyond the memory",
            "refused before it starts, with atoms, edges and bytes",
            {
                "test_memory.py": [
                    "test_the_message_names_atoms_edges_and_bytes_and_comes_before_the_search",
                    "test_edges_that_only_the_search_finds_count_too",
                ]
            },
        ),
    ],
    "Files": [
        Fault(
            "a checkpoint or model file that is cut off, altered or of another kind",
            "refused as damaged, with the other checkpoints there are; no altered number is read",
            {
                "checkpoint/test_read.py": [
                    "test_a_truncated_file_is_called_damaged",
                    "test_an_altered_byte_never_changes_what_is_read",
                    "test_every_truncation_is_called_damaged_and_offers_the_other_checkpoints",
                    "test_another_kind_of_file_is_called_so_without_the_advice_of_pytorch",
                ],
                "checkpoint/test_native.py": [
                    "test_a_truncated_file_is_called_damaged",
                    "test_a_changed_weight_is_noticed",
                    "test_a_changed_card_is_noticed",
                ],
            },
        ),
        Fault(
            "a checkpoint made to run code",
            "refused by name; nothing of it runs",
            {
                "checkpoint/test_read.py": ["test_a_crafted_pickle_is_refused_by_name_and_does_nothing"],
                "training/test_atomic_files.py": ["test_a_crafted_checkpoint_is_refused_and_does_nothing"],
                "datasets/test_structure_tables.py": ["test_a_pickled_lmdb_is_refused_and_never_unpickled"],
            },
        ),
        Fault(
            "a structure file that is cut off, empty or of an unknown kind",
            "refused with the file, and the line or frame",
            {
                "datasets/test_ase.py": [
                    "test_a_truncated_file_is_refused",
                    "test_a_file_cut_inside_its_last_line_is_refused_by_line",
                    "test_a_truncated_compressed_file_is_refused",
                    "test_a_truncated_binary_file_is_refused",
                    "test_an_empty_file_is_refused",
                    "test_an_unknown_kind_of_file_is_refused",
                ],
                "datasets/test_structure_tables.py": [
                    "test_a_truncated_file_is_refused_by_name",
                    "test_a_file_of_something_else_is_refused_by_name",
                    "test_a_damaged_row_is_refused_by_number",
                ],
            },
        ),
        Fault(
            "a download that breaks off, stalls or brings something else",
            "goes on where it was; a file gets its name when it is complete and has its checksum",
            {
                "datasets/test_download.py": [
                    "test_passing_faults_are_survived",
                    "test_an_interrupted_download_goes_on_where_it_stopped",
                    "test_a_reset_in_the_middle_costs_only_the_rest",
                    "test_a_run_that_was_killed_is_taken_up_by_the_next",
                    "test_a_lasting_fault_gives_up_and_leaves_nothing_under_the_name",
                    "test_a_wrong_checksum_leaves_nothing_behind_each_time",
                ]
            },
        ),
        Fault(
            "a full disk",
            "said in one line; what is complete stays, nothing half written keeps a name",
            {
                "datasets/test_download.py": [
                    "test_too_small_a_disk_is_noticed_before_the_download",
                    "test_a_disk_that_fills_up_keeps_what_came_and_goes_on_later",
                    "test_a_file_that_cannot_grow_keeps_what_came_and_goes_on_later",
                    "test_a_disk_that_fills_up_while_unpacking_is_told_and_leaves_no_half_file",
                ],
                "datasets/test_memdataset.py": ["test_a_full_disk_while_storing_leaves_no_arrays_and_says_so"],
                "training/test_run.py": ["test_a_result_that_cannot_be_written_costs_no_other_and_is_an_error"],
                "training/test_folder.py": [
                    "test_a_disk_that_is_full_from_the_start_is_told_before_anything_is_trained",
                    "test_a_run_that_cannot_write_keeps_its_last_checkpoint_and_tells_how_to_go_on",
                ],
                "labelling/test_label.py": ["test_a_full_disk_keeps_what_was_computed"],
            },
        ),
        Fault(
            "the folder of a run, or files in it, are deleted or renamed while it runs",
            "made again with settings, division and tables, with a warning",
            {
                "training/test_folder.py": [
                    "test_a_folder_that_goes_is_made_again_with_settings_division_and_tables",
                    "test_files_that_go_are_written_again",
                ]
            },
        ),
        Fault(
            "a damaged entry in the cache of data or of compiled loops",
            "counts as absent and is made again",
            {
                "datasets/test_cache.py": [
                    "test_a_damaged_entry_is_built_anew",
                    "test_descriptions_that_say_something_else_are_made_anew",
                ],
                "datasets/test_frames.py": ["test_a_description_of_something_else_is_refused"],
                "test_loop_cache.py": ["test_a_damaged_file_counts_as_none"],
            },
        ),
        Fault(
            "folders that may not be read or written, or no home folder",
            "done without, with a warning that names the setting; data sets are refused in one line",
            {
                "test_loop_cache.py": [
                    "test_what_cannot_be_replaced_is_compiled_all_the_same",
                    "test_a_loop_runs_where_nothing_can_be_written",
                ],
                "datasets/test_cache.py": ["test_a_cache_that_cannot_be_written_is_done_without"],
                "test_whole_files.py": [
                    "test_data_are_kept_in_memory_where_the_cache_may_not_be_entered",
                    "test_a_data_set_in_a_folder_that_may_not_be_entered_is_refused_in_one_line",
                    "test_a_user_without_a_home_folder_gets_a_temporary_one",
                ],
            },
        ),
    ],
    "Kills": [
        Fault(
            "a training run is killed",
            "`--load-model` arrives at the numbers of a run without interruption",
            {
                "training/test_resume.py": [
                    "test_a_killed_run_continues_as_if_nothing_had_happened",
                    "test_a_run_killed_again_and_again_still_arrives",
                ],
                "training/test_averaging.py": ["test_a_killed_run_continues_as_if_nothing_had_happened"],
            },
        ),
        Fault(
            "a run is asked to stop, or an exception ends it",
            "the step is saved, and the run continues from there",
            {
                "training/test_resume.py": [
                    "test_a_stopped_run_saves_the_step_it_was_at_and_continues_from_there",
                    "test_a_validation_is_finished_after_one_interrupt_and_given_up_after_two",
                ],
                "training/test_run.py": [
                    "test_an_exception_inside_an_epoch_leaves_the_steps_so_far",
                    "test_an_exception_in_the_middle_of_an_update_keeps_the_last_whole_state",
                ],
                "training/test_folder.py": [
                    "test_a_signal_outside_of_the_loop_ends_the_run_and_tells_how_to_go_on",
                    "test_a_signal_before_a_resumed_run_begins_points_to_the_checkpoint",
                ],
            },
        ),
        Fault(
            "`torchmd-net label` is killed",
            "the same command goes on where it was",
            {"labelling/test_label.py": ["test_a_run_that_was_killed_goes_on_where_it_was"]},
        ),
        Fault(
            "`torchmd-net md` is killed",
            "`--resume` goes on, and every file is as if it had not been",
            {"scripts/test_md.py": ["test_a_simulation_that_was_killed_gives_the_same_files"]},
        ),
        Fault(
            "dynamics explode in `torchmd-net md`",
            "they stop with what is wrong, status 1, the last good state saved",
            {"scripts/test_md.py": ["test_what_the_structure_leaves_ends_it_with_a_reason"]},
        ),
        Fault(
            "two runs in one folder, two processes with one cache",
            "the second run is refused; caches are filled once",
            {
                "config/test_rundir.py": [
                    "test_a_folder_that_another_run_writes_to_is_refused_until_that_run_ends_or_is_killed"
                ],
                "labelling/test_label.py": ["test_two_runs_do_not_write_to_one_journal"],
                "test_loop_cache.py": ["test_processes_that_start_together_compile_once"],
                "datasets/test_cache.py": ["test_processes_may_build_the_same_entry_at_once"],
                "datasets/test_download.py": ["test_two_processes_fetch_once"],
            },
        ),
    ],
    "Nodes": [
        Fault(
            "a process of a distributed run does not come, or runs other settings",
            "all end within the bounded wait, and say which one",
            {
                "training/test_distributed.py": [
                    "test_a_node_that_is_left_alone_gives_up_and_says_for_whom_it_waited",
                    "test_a_port_that_another_program_holds_does_not_hold_the_run",
                    "test_a_process_that_never_comes_is_named_in_every_process",
                    "test_a_process_whose_launcher_ended_while_it_was_starting_ends_too",
                    "test_other_settings_are_refused_in_every_process_by_key_and_value",
                ]
            },
        ),
        Fault(
            "one of them dies or stops",
            "the others end, name it, and say how to go on",
            {
                "training/test_distributed.py": [
                    "test_a_node_that_dies_is_named_by_the_other_which_says_how_to_go_on",
                    "test_a_node_that_stops_without_dying_is_given_up_in_time",
                    "test_a_node_that_stops_in_the_rendezvous_is_given_up_in_time",
                ]
            },
        ),
        Fault(
            "one of them is asked to stop",
            "all save in the middle of the epoch and end",
            {
                "training/test_distributed.py": [
                    "test_sigterm_to_any_of_two_nodes_saves_in_the_middle_of_an_epoch_and_ends_both"
                ]
            },
        ),
        Fault(
            "the process that started the others is killed",
            "they end within seconds",
            {"training/test_distributed.py": ["test_no_process_outlives_the_one_that_started_it"]},
        ),
    ],
    "Settings": [
        Fault(
            "values of the wrong kind, unknown names, numbers out of range",
            "refused before any work with place, key, value and what is accepted",
            {
                "config/test_values.py": [
                    "test_values_that_do_not_fit_are_refused_with_place_key_and_value",
                    "test_unknown_names_are_refused_with_the_nearest",
                ],
                "config/test_settings.py": ["test_errors_name_file_line_key_value_and_fix"],
                "config/test_reader.py": ["test_files_that_hold_no_settings_are_refused_by_name"],
            },
        ),
        Fault(
            "sizes, cutoffs, rates and counts that nothing has, and models beyond the memory",
            "refused before anything is allocated, from a command line and from a model file alike",
            {
                "test_limits.py": [
                    "test_settings_have_bounds",
                    "test_a_model_beyond_the_memory_is_refused_before_it_is_made",
                ],
                "training/test_reach.py": ["test_a_cutoff_with_more_images_than_memory_holds_is_refused"],
            },
        ),
        Fault(
            "objects of another kind by address, arguments of priors and losses that no data make right",
            "refused by name before they are called and before data are read",
            {
                "test_catalogue.py": ["test_objects_of_another_kind_are_refused_before_they_are_called"],
                "priors/test_arguments.py": [
                    "test_ranges_are_finite_and_positive",
                    "test_units_are_finite_and_positive",
                    "test_the_distances_of_charges_are_checked",
                    "test_tables_of_elements_have_a_size",
                    "test_types_of_atoms_are_elements",
                ],
                "test_losses.py": ["test_a_loss_that_gives_no_number_is_refused"],
            },
        ),
        Fault(
            "an environment that names processes or nodes which the settings do not have",
            "refused by the name of the variable before anything is made",
            {
                "config/test_launcher.py": [
                    "test_a_place_that_the_settings_do_not_have_is_refused",
                    "test_the_environment_is_looked_at_before_anything_is_made",
                ],
            },
        ),
        Fault(
            "options that cannot work together or with the data",
            "refused before training",
            {
                "config/test_checks.py": [
                    "test_monitors_that_are_never_logged_are_refused",
                    "test_something_must_be_trained_on",
                    "test_fractions_above_one_are_refused_by_name",
                    "test_an_empty_training_set_is_refused",
                ],
                "training/test_run.py": ["test_options_the_data_cannot_serve_are_refused_before_training"],
            },
        ),
        Fault(
            "anything at all as settings, command line, structures or model file",
            "read right, or refused by name in bounded time and memory (`make fuzz` makes more of them)",
            {
                "fuzz/test_fuzz.py": [
                    "test_any_settings_file_is_read_or_refused",
                    "test_any_command_line_is_read_or_refused",
                    "test_any_file_of_structures_is_examined_or_refused",
                    "test_any_model_file_is_loaded_or_refused",
                    "test_a_file_of_structures_that_was_trouble_is_examined_or_refused",
                    "test_a_checkpoint_with_wrong_options_is_refused",
                ]
            },
        ),
        Fault(
            "any arguments of any command, any settings of a small training, any environment",
            "a result, or a message in one line and a status that scripts know, within the same bounds; nothing half "
            "written is left and no process goes on (`make fuzz` makes more of them)",
            {
                "fuzz/test_fuzz.py": [
                    "test_any_command_ends_with_a_result_or_a_message",
                    "test_any_small_training_ends_with_a_result_or_a_message",
                    "test_any_environment_is_taken_or_refused",
                    "test_a_run_may_be_in_a_folder_of_any_name",
                    "test_a_program_that_failed_once_ends_with_a_result_or_a_message",
                ]
            },
        ),
        Fault(
            "any damage to the folder of a run or to the cache of data",
            "the run goes on or is refused; the data are those of the files (`make fuzz` makes more of them)",
            {
                "fuzz/test_fuzz.py": [
                    "test_any_folder_of_a_run_is_continued_or_refused",
                    "test_any_damage_to_the_cache_leaves_the_data_as_they_are",
                ]
            },
        ),
        Fault(
            "a run is continued on other data",
            "refused",
            {"training/test_resume.py": ["test_a_run_does_not_continue_on_changed_data"]},
        ),
    ],
    "Workers": [
        Fault(
            "a calculation raises, crashes, never returns or takes all memory",
            "costs its structure, which is named; the rest goes on",
            {
                "labelling/test_workers.py": [
                    "test_a_fault_costs_its_piece_and_nothing_else",
                    "test_bounds_hold_beside_work_that_goes_well",
                ],
                "labelling/test_label.py": ["test_structures_that_fail_are_noted_left_out_and_tried_again_when_asked"],
                "labelling/test_sample.py": ["test_dynamics_that_never_end_are_given_up_by_name"],
            },
        ),
        Fault(
            "a calculator cannot be made, or is never ready",
            "refused in one line",
            {"labelling/test_workers.py": ["test_getting_ready_has_a_bound"]},
        ),
        Fault(
            "the process that started workers is killed",
            "they and the programs that they have started end within seconds",
            {
                "labelling/test_workers.py": ["test_no_process_outlives_the_one_that_started_it"],
                "test_processes.py": ["test_children_end_with_a_parent_that_is_killed"],
            },
        ),
    ],
}

TEXT = """\
# What happens when something goes wrong

Faults that the tests bring about, {total} tries in all, and what happens then. A try is one call of a test with one row
of its parameters; many go through more than one fault. This page is written by `tools/build_docs_faults.py`, which
counts them in the tests, and a test compares. What to do about a message: [Troubleshooting](troubleshooting.md).
"""


def page() -> str:
    """The text of the page."""
    parts, total = [], 0
    for kind, faults in FAULTS.items():
        rows = [f"\n## {kind}\n", "| fault | what happens | tries | tests |", "|---|---|---|---|"]
        for fault in faults:
            tries = sum(tries_of(file, name) for file, names in fault.tests.items() for name in names)
            total += tries
            tests = ", ".join(f"`tests/{file}`" for file in fault.tests)
            rows.append(f"| {fault.what} | {fault.outcome} | {tries} | {tests} |")
        parts.append("\n".join(rows) + "\n")
    return TEXT.format(total=total) + "".join(parts)


def tries_of(file: str, name: str) -> int:
    """How often pytest calls a test: the product of the lengths of its parameter lists.

    Raises:
        LookupError: If there is no such test, or a list is not written out in its file.
    """
    tree = ast.parse((REPOSITORY / "tests" / file).read_text(encoding="utf-8"))
    found = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name]
    if not found:
        raise LookupError(f"tests/{file} has no test {name}: name another in tools/build_docs_faults.py")
    known: dict[str, ast.expr | ast.ImportFrom] = {
        target.id: node.value
        for node in tree.body
        if isinstance(node, (ast.Assign, ast.AnnAssign)) and node.value is not None
        for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
        if isinstance(target, ast.Name)
    }
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torchmdnet."):
            known |= {alias.asname or alias.name: node for alias in node.names}
    calls = [call for call in found[0].decorator_list if isinstance(call, ast.Call)]
    lists = [call.args[1] for call in calls if ast.unparse(call.func) == "pytest.mark.parametrize"]
    return math.prod(_length(values, known, f"tests/{file}: {name}") for values in lists)


def _length(values: ast.expr, known: dict[str, ast.expr | ast.ImportFrom], where: str) -> int:
    if isinstance(values, (ast.List, ast.Tuple)):
        return sum(_length(v.value, known, where) if isinstance(v, ast.Starred) else 1 for v in values.elts)
    if isinstance(values, ast.Dict) and None not in values.keys:
        return len(values.keys)
    if isinstance(values, ast.Name) and values.id in known:
        source = known[values.id]
        if isinstance(source, ast.ImportFrom):  # a table of the package
            return len(getattr(importlib.import_module(str(source.module)), values.id))
        return _length(source, known, where)
    if isinstance(values, ast.Call) and ast.unparse(values.func) == "range":
        return len(range(*(ast.literal_eval(bound) for bound in values.args)))
    if isinstance(values, ast.Call) and ast.unparse(values.func) in ("daily", "rarely"):  # the others are tried, too
        return _length(values.args[0], known, where)
    raise LookupError(f"{where}: the parameters {ast.unparse(values)} cannot be counted; write a list")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(PAGE)
