# fish completion for omni-deploy, deploy-manifest and deployer
function __omni_deploy_complete
    set -l words (commandline -opc)
    set -l current (commandline -ct)
    for line in (omni-deploy completions --complete -- $words "$current" 2>/dev/null)
        if test "$line" = :files
            set -l flag (string match -r -- '^--[^=]*=' "$current")
            for path in (__fish_complete_path (string replace -r -- '^--[^=]*=' '' "$current"))
                printf '%s\n' "$flag$path"
            end
        else
            printf '%s\n' $line
        end
    end
end
for name in omni-deploy deploy-manifest deployer
    complete -c $name -f -a '(__omni_deploy_complete)'
end
